r"""Right or wrong: by verl's own scorer, so that evaluation and training reward agree, and by what the answer itself says.

verl's verdict counts the form, too: `#### 72` for GSM8K, `\boxed{72}` or `Answer: 72` elsewhere. Beside it stand two that look for the
answer wherever it is (`flexible`) and in the last box (`boxed`), by math-verify, which compares formulas by their meaning.
Imported by graders (evals/pool.py); none of the functions keeps to a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from flashrl_cli.evals import extract
from flashrl_cli.evals.results import Grade
from flashrl_cli.verl import rewards

if TYPE_CHECKING:
    from flashrl_cli.evals.questions import Question

_RIGHT = 0.5
"""A score above it is right: scorers give 0 or 1, or -1 or 1; geo3k gives 0.1 for the form and 0.9 for the answer."""
_LONGEST_PROBLEM = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """verl's: `score` and whether it is right; `problem` says why there is none."""

    score: float = 0.0
    correct: bool = False
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the response says, see Grade; `problem` says why its answer could not be compared."""

    flexible: bool | None = None
    boxed: bool | None = None
    prediction: str | None = None
    problem: str | None = None


def unread(question: Question, response: str, problem: str) -> Reading:
    """Of a `response` whose answer could not be compared: wrong where it would have been right or wrong."""
    if _comparison(question.data_source) is None:
        return Reading(problem=problem)
    return Reading(flexible=False, boxed=False, prediction=extract.prediction(response), problem=problem)


def joined(verdict: Verdict, reading: Reading) -> Grade:
    """Both as one grade; verl's problem goes before the other's."""
    return Grade(
        score=verdict.score,
        correct=verdict.correct,
        flexible=reading.flexible,
        boxed=reading.boxed,
        prediction=reading.prediction,
        problem=verdict.problem or reading.problem,
    )


def grade_all(work: Sequence[tuple[Question, str]]) -> list[Grade]:
    """Grades of responses, each with its question."""
    return [joined(judge(question, response), read(question, response)) for question, response in work]


def judge(question: Question, response: str) -> Verdict:
    """verl's verdict on `response`. Raises ImportError if its scorer lacks a library: no response could be graded."""
    try:
        points, correct = _score(question, response)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  (scorers raise anything, and one response is not the run)
        return Verdict(problem=_problem("verl's scorer failed", error))
    return Verdict(score=points, correct=correct)


def read(question: Question, response: str) -> Reading:
    """What `response` says, and whether that is the truth; nothing where the truth is neither number nor formula."""
    compare = _comparison(question.data_source)
    if compare is None:
        return Reading()
    try:
        flexible, boxed = compare(str(question.ground_truth), response)
        return Reading(flexible=flexible, boxed=boxed, prediction=extract.prediction(response))
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  (as above)
        return unread(question, response, _problem("the answer could not be compared", error))


def _score(question: Question, response: str) -> tuple[float, bool]:
    """Score and whether it is right (verl/utils/reward_score/__init__.py, default_compute_score)."""
    from verl.utils.reward_score import default_compute_score

    result = default_compute_score(question.data_source, response, question.ground_truth, question.extra_info)
    if not isinstance(result, dict):
        return float(result), float(result) > _RIGHT
    points = float(result["score"])
    return points, bool(result.get("acc", points > _RIGHT))


def _comparison(source: str) -> Callable[[str, str], tuple[bool, bool]] | None:
    if rewards.is_number(source):
        return _compare_number
    return _compare_formula if rewards.is_math(source) else None


def _compare_number(truth: str, response: str) -> tuple[bool, bool]:
    """Whether the last number is `truth`, and whether the last box is."""
    flexible, box = _is_number(truth, extract.last_number(response)), extract.boxed(response)
    if not box:
        return flexible, False
    answer = extract.without_unit(box)
    said = extract.number(answer)  # of numbers math-verify says the same, and takes some milliseconds
    return flexible, _same(truth, answer) if said is None else _is_number(truth, said)


def _compare_formula(truth: str, response: str) -> tuple[bool, bool]:
    r"""Whether the answer is `truth`, and whether the last box is.

    The answer is the last box or what math-verify takes for it: of several boxes it makes a set, and `\boxed{3}, so \boxed{4}`
    would never be 4.
    """
    box, wanted = extract.boxed(response), extract.without_end(truth)
    boxed = bool(box) and _same(wanted, box or "")
    return boxed or _verifies(wanted, response), boxed


def _is_number(truth: str, found: Decimal | None) -> bool:
    try:
        return found is not None and Decimal(truth.replace(",", "")) == found
    except InvalidOperation:
        return False


def _same(truth: str, answer: str) -> bool:
    return truth == answer or _verifies(truth, rf"\boxed{{{answer}}}")


def _verifies(truth: str, text: str) -> bool:
    """Whether math-verify reads `truth` in `text`. Its alarm is off: a grader has a limit from outside, which C code heeds, too."""
    from math_verify import parse, verify

    wanted = parse(rf"\boxed{{{truth}}}", parsing_timeout=None)
    return bool(wanted) and bool(verify(wanted, parse(text, parsing_timeout=None), timeout_seconds=None))


def _problem(what: str, error: Exception) -> str:
    return f"{what}: {type(error).__name__}: {error}"[:_LONGEST_PROBLEM]

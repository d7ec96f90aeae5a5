r"""Grade responses by verl's own scorer, so that evaluation and training reward agree, and by the answer itself.

verl's verdict also depends on the form: `#### 72` for GSM8K, `\boxed{72}` or `Answer: 72` elsewhere. Two other
extractors find the answer anywhere in a response (`flexible`) and in its last box (`boxed`); they use math-verify,
which compares formulas by their meaning. Numbers are those of lm-evaluation-harness for GSM8K
(lm_eval/tasks/gsm8k/gsm8k.yaml, filter flexible-extract: the last match counts; commas, dollar signs and a trailing dot
do not), with three differences: a match has a digit, a comma belongs to a number only where it separates thousands, and
a hyphen is a sign only where no character precedes it (`8-3` ends with 3).

Graders (evals/graders.py) call these functions, and end those that take too long.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from flashrl_cli.data.recipes import boxed_answer
from flashrl_cli.evals.results import Grade
from flashrl_cli.plugins import scorers
from flashrl_cli.reward_function import Call, Failed, RewardFunction, Shipped, is_right
from flashrl_cli.verl import rewards

if TYPE_CHECKING:
    from flashrl_cli.evals.questions import Question

_THIN = re.compile(r"\{,\}|(?:,?\\[,!;:]\s*)(?=\d{3}(?!\d))")
"""Separators that LaTeX puts between thousands, in addition to the plain comma."""
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-\s?)?(?:\\?\$\s?)?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
)
_AFTER_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_AFTER_ANSWER = re.compile(r"answer[ \t]*:[ \t]*([^\n]*)", re.IGNORECASE)
_EDGES = " \t\n*"


def last_number(text: str) -> Decimal | None:
    """The last number of `text`; None if there is none."""
    found = None
    for found in _NUMBER.finditer(_plain(text)):  # noqa: B007
        pass
    return found and _value(found)


def number(text: str) -> Decimal | None:
    """The number that `text` is; None if the text holds anything else."""
    found = _NUMBER.fullmatch(_plain(text))
    return found and _value(found)


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed` that closes, without a full stop or a percent sign at its end."""
    content = boxed_answer(text)
    return None if content is None else without_end(content)


def without_end(answer: str) -> str:
    """`answer` without a full stop and a percent sign at its end, and with plain commas between thousands."""
    return _plain(answer).strip().removesuffix(".").removesuffix("%").removesuffix("\\").rstrip()


def without_unit(answer: str) -> str:
    """`answer` without the words after its number: 72 of `72 clips`."""
    return re.sub(r"(?<=\d)\s+[a-zA-Z][a-zA-Z ]*$", "", answer)


def prediction(text: str) -> str | None:
    """The answer that a reader would find: in the last box, after ####, after `Answer:`, or the last number."""
    for found in (last_box(text), _last(_AFTER_HASHES, text), _last(_AFTER_ANSWER, text)):
        if found:
            return found
    number = last_number(text)
    return None if number is None else f"{number:f}"


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return without_end(found[-1].strip(_EDGES)) if found else None


def _plain(text: str) -> str:
    return _THIN.sub(lambda found: "," if found[0] == "{,}" else "", text).replace("\N{MINUS SIGN}", "-")


def _value(found: re.Match[str]) -> Decimal:
    value = Decimal(found["digits"].replace(",", ""))
    return -value if found["sign"] else value


_RIGHT = 0.5
"""A score above it is right. Scorers give 0 or 1, or -1 or 1; geo3k gives 0.1 for the form and 0.9 for the answer."""
_LONGEST_PROBLEM = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """verl's verdict: `score` and whether it is right; `problem` says why there is no verdict."""

    score: float = 0.0
    correct: bool = False
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The answer in a response (see Grade); `problem` says why it could not be compared."""

    flexible: bool | None = None
    boxed: bool | None = None
    prediction: str | None = None
    problem: str | None = None


def unread(question: Question, response: str, problem: str) -> Reading:
    """The reading of a `response` that could not be compared: it counts as wrong where an extractor applies."""
    if _comparison(question.data_source) is None:
        return Reading(problem=problem)
    return Reading(flexible=False, boxed=False, prediction=prediction(response), problem=problem)


def joined(verdict: Verdict, reading: Reading) -> Grade:
    """Combine both into one grade; verl's problem takes precedence."""
    return Grade(
        score=verdict.score,
        correct=verdict.correct,
        flexible=reading.flexible,
        boxed=reading.boxed,
        prediction=reading.prediction,
        problem=verdict.problem or reading.problem,
    )


def grade_all(work: Sequence[tuple[Question, str]]) -> list[Grade]:
    """Grade several responses, each given with its question."""
    return [joined(judge(question, response), read(question, response)) for question, response in work]


def judge(question: Question, response: str) -> Verdict:
    """verl's verdict on `response`. Raises ImportError if its scorer lacks a library: no response could be graded."""
    try:
        points, correct = _score(question, response)
    except Failed as failed:
        return Verdict(problem=f"the reward function {failed.failure.what}"[:_LONGEST_PROBLEM])
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  (scorers raise anything, and one response is not the run)
        return Verdict(problem=_problem("verl's scorer failed", error))
    return Verdict(score=points, correct=correct)


def read(question: Question, response: str) -> Reading:
    """The answer in `response` and whether it is right; empty if the truth is neither number nor formula."""
    compare = _comparison(question.data_source)
    if compare is None:
        return Reading()
    try:
        flexible, boxed = compare(str(question.ground_truth), response)
        return Reading(flexible=flexible, boxed=boxed, prediction=prediction(response))
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  (as above)
        return unread(question, response, _problem("the answer could not be compared", error))


def _score(question: Question, response: str) -> tuple[float, bool]:
    """Score of a response and whether it is right (verl/utils/reward_score/__init__.py, default_compute_score).

    Raises Failed if the user's own function gives none.
    """
    if question.reward is not None:
        call = Call(question.data_source, response, question.ground_truth, question.extra_info or {})
        score = _own(question.reward.text())(call)
        return score.score, is_right(score, question.reward.threshold)
    if scorers.knows(question.data_source):
        compute_score: Callable[..., Any] = scorers.compute_score
    else:
        from verl.utils.reward_score import default_compute_score

        compute_score = default_compute_score
    result = compute_score(question.data_source, response, question.ground_truth, question.extra_info)
    if not isinstance(result, dict):
        return float(result), float(result) > _RIGHT
    points = float(result["score"])
    return points, bool(result.get("acc", points > _RIGHT))


@functools.cache
def _own(shipped: str) -> RewardFunction:
    """The user's function, loaded once in each grader."""
    return Shipped(**json.loads(shipped)).load()


def _comparison(source: str) -> Callable[[str, str], tuple[bool, bool]] | None:
    if rewards.is_number(source):
        return _compare_number
    return _compare_formula if rewards.is_math(source) else None


def _compare_number(truth: str, response: str) -> tuple[bool, bool]:
    """Whether the last number equals `truth`, and whether the last box does."""
    flexible, box = _is_number(truth, last_number(response)), last_box(response)
    if not box:
        return flexible, False
    answer = without_unit(box)
    said = number(answer)  # math-verify gives the same result for numbers, but takes some milliseconds
    return flexible, _same(truth, answer) if said is None else _is_number(truth, said)


def _compare_formula(truth: str, response: str) -> tuple[bool, bool]:
    r"""Whether the answer equals `truth`, and whether the last box does.

    The answer is the last box, or else the text that math-verify extracts. It would combine several boxes into a set,
    and `\boxed{3}, so \boxed{4}` would never equal 4.
    """
    box, wanted = last_box(response), without_end(truth)
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
    """Whether math-verify finds `truth` in `text`; its alarm is off, because a grader's limit also ends C code."""
    from math_verify import parse, verify

    wanted = parse(rf"\boxed{{{truth}}}", parsing_timeout=None)
    return bool(wanted) and bool(verify(wanted, parse(text, parsing_timeout=None), timeout_seconds=None))


def _problem(what: str, error: Exception) -> str:
    return f"{what}: {type(error).__name__}: {error}"[:_LONGEST_PROBLEM]

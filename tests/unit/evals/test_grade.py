"""The answer in a response, and whether it is right by verl's scorer and by itself."""

from __future__ import annotations

import sys
import types
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.evals import grade
from flashrl_cli.evals.grade import Reading, Verdict
from flashrl_cli.evals.questions import Question
from flashrl_cli.evals.results import Grade

GSM8K, MATH, DAPO, CODE = "openai/gsm8k", "HuggingFaceH4/MATH-500", "math_dapo", "codecontests"


def question(source: str, truth: object = "2") -> Question:
    return Question([], source, truth, {"index": 1})


def scorer(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[tuple[Any, ...]]:
    """Put a scorer in verl's place that returns `result`, or raises it; returns the list of its calls."""
    calls: list[tuple[Any, ...]] = []

    def default_compute_score(*args: Any) -> Any:
        calls.append(args)
        if isinstance(result, Exception):
            raise result
        return result

    module = types.ModuleType("verl.utils.reward_score")
    module.default_compute_score = default_compute_score  # type: ignore[attr-defined]
    for name in ("verl", "verl.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (1, (1.0, True)),
        (0, (0.0, False)),
        (0.1, (0.1, False)),
        (0.9, (0.9, True)),
        ({"score": -1.0, "acc": False, "pred": "3"}, (-1.0, False)),
        ({"score": 0.2, "acc": True}, (0.2, True)),
        ({"score": 1.0}, (1.0, True)),
    ],
)
def test_verdict(monkeypatch: pytest.MonkeyPatch, result: Any, expected: tuple[float, bool]) -> None:
    calls = scorer(monkeypatch, result)
    assert grade.judge(question("s"), "#### 2") == Verdict(score=expected[0], correct=expected[1])
    assert calls == [("s", "#### 2", "2", {"index": 1})]


def test_a_scorer_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer(monkeypatch, ValueError("x" * 999))
    verdict = grade.judge(question(CODE), "")
    assert verdict.problem
    assert verdict == Verdict(problem=verdict.problem)
    assert verdict.problem.startswith("verl's scorer failed: ValueError: xxx")
    assert len(verdict.problem) == 200


def test_a_scorer_that_lacks_a_library_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer(monkeypatch, ModuleNotFoundError("pylatexenc"))
    with pytest.raises(ImportError, match="pylatexenc"):
        grade.judge(question(CODE), "")


def test_a_grade_joins_both(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer(monkeypatch, 1.0)
    wanted = Grade(score=1.0, correct=True, flexible=True, boxed=False, prediction="2")
    assert grade.grade_all([(question(GSM8K), "#### 2"), (question(CODE), "2")]) == [
        wanted,
        Grade(score=1.0, correct=True),
    ]
    both = grade.joined(Verdict(problem="verl's"), Reading(flexible=False, boxed=False, problem="the other's"))
    assert both == Grade(score=0.0, correct=False, flexible=False, boxed=False, problem="verl's")
    assert grade.joined(Verdict(correct=True, score=1.0), Reading(problem="slow")).problem == "slow"


def test_what_cannot_be_compared_is_wrong_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("math_verify.parse", lambda *_, **__: 1 / 0)
    found = grade.read(question(MATH), r"\boxed{3}")
    problem = "the answer could not be compared: ZeroDivisionError: division by zero"
    assert found == Reading(flexible=False, boxed=False, prediction="3", problem=problem)
    assert grade.unread(question(CODE), "3", "slow") == Reading(problem="slow")


@pytest.mark.parametrize(
    ("truth", "response", "flexible", "boxed"),
    [
        ("72", "#### 72", True, False),
        ("72", r"so \boxed{72}", True, True),
        ("72", r"72 of them, \boxed{70}", False, False),
        ("72", r"\boxed{70}, no, \boxed{72}", True, True),
        ("72", r"\boxed{72}, no, \boxed{70}", False, False),
        ("72", r"\boxed{72} in 3 days", False, True),
        ("72", "72, or maybe 5", False, False),
        ("72", "5, or maybe 172", False, False),
        ("72", "7.2", False, False),
        ("72", "720", False, False),
        ("72", "", False, False),
        ("72", "...", False, False),
        ("72", "I do not know", False, False),
        ("72", r"\boxed{72", True, False),
        ("72", r"\boxed{}", False, False),
        ("72", r"\boxed{72 \text{ clips}}", True, True),
        ("72", r"\boxed{72 clips}.", True, True),
        ("72", r"\boxed{x = 72}", True, True),
        ("72", r"\boxed{72.00}", True, True),
        ("72", r"\boxed{71, 72}", True, False),
        ("72", r"\boxed{144/2}", False, True),
        ("1000", "It is 1,000.", True, False),
        ("1,000", "It is 1000", True, False),
        ("1000", r"\boxed{\$1,000}", True, True),
        ("1000", r"\boxed{1{,}000}", True, True),
        ("1000", r"\boxed{1\,000}", True, True),
        ("1000", r"\boxed{1000.}", True, True),
        ("1000", "1", False, False),
        ("1", "1,000", False, False),
        ("12", r"\boxed{1,2}", False, False),
        ("50", r"\boxed{50\%}", True, True),
        ("50", "50%", True, False),
        ("-3", r"\boxed{-3}", True, True),
        ("-3", "it fell by 3", False, False),
        ("3", "x = -3", False, False),
        ("3", "8-3", True, False),
        ("-3", "8-3", False, False),
        ("18", r"\boxed{18 dollars a day}", True, True),
        ("72", r"\boxed{5 + 67}", False, True),
        ("2", r"\boxed{2x}", True, False),
        ("3", r"\boxed{3!}", True, False),
        ("5", r"\boxed{\$5}", True, True),
        ("-1000", r"\boxed{-1,000}", True, True),
        ("0.5", r"\boxed{.5}", True, True),
        ("unclear", "7", False, False),
    ],
)
def test_a_number_is_compared(truth: str, response: str, flexible: bool, boxed: bool) -> None:
    found = grade.read(question(GSM8K, truth), response)
    assert (found.flexible, found.boxed, found.problem) == (flexible, boxed, None)


@pytest.mark.parametrize("source", [MATH, DAPO, "aime_2031", "numina_amc_aime"])
@pytest.mark.parametrize(
    ("truth", "response", "flexible", "boxed"),
    [
        (r"\frac{1}{2}", r"so \boxed{\frac12}", True, True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True, True),
        (r"\frac{1}{2}", "The answer is $1/2$.", True, False),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}, not $\frac{1}{2}$", False, False),
        (r"\frac{1}{2}", "", False, False),
        ("34", "Answer: 34", True, False),
        ("34", "Answer: 43", False, False),
        ("34", "34 is nice. Answer: 43", False, False),
        ("4", r"\boxed{3}, no, \boxed{4}", True, True),
        ("3", r"\boxed{3}, no, \boxed{4}", False, False),
        ("073", r"\boxed{73}", True, True),
        ("x^2+1", r"\boxed{1+x^2}", True, True),
        ("x^2+1", r"\boxed{1-x^2}", False, False),
        ("(1,2)", r"\boxed{(2,1)}", False, False),
        (r"10\%", r"\boxed{10}", True, True),
        (r"\text{even}", r"\boxed{\text{odd}}", False, False),
        (r"\text{even}", r"\boxed{\text{even}}", True, True),
        ("", r"\boxed{4}", False, False),
        ("1000", r"\boxed{1\,000}", True, True),
        ("2", r"\boxed{2,000}", False, False),
        ("-3", r"\boxed{3}", False, False),
    ],
)
def test_a_formula_is_compared(source: str, truth: str, response: str, flexible: bool, boxed: bool) -> None:
    found = grade.read(question(source, truth), response)
    assert (found.flexible, found.boxed, found.problem) == (flexible, boxed, None)


@pytest.mark.parametrize("source", [CODE, "hiyouga/geometry3k", "searchR1_nq"])
def test_elsewhere_nothing_is_compared(source: str) -> None:
    assert grade.read(question(source, "2"), r"\boxed{2}") == Reading()


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_a_number_is_right_exactly_when_it_is_the_truth(truth: int, said: int) -> None:
    """In every dress, and never when it is another one."""
    for written in (f"{said}", f"{said:,}", f"{said}.0", f"${said}$"):
        found = grade.read(question(GSM8K, str(truth)), rf"Let us see: {truth} = {truth}. So \boxed{{{written}}}.")
        assert (found.flexible, found.boxed) == (said == truth, said == truth)
        again = grade.read(question(GSM8K, str(said)), rf"Let us see: {truth} = {truth}. So \boxed{{{written}}}.")
        assert (again.flexible, again.boxed) == (True, True)


NUMBERS = {
    "": None,
    "none here": None,
    "...": None,
    "72": "72",
    "so 5 + 67 = 72.": "72",
    "12 07 #### 72": "72",
    "It costs $1,234.50.": "1234.50",
    "1,000,000 in all": "1000000",
    "1{,}000": "1000",
    r"1\,000": "1000",
    r"12,\!345": "12345",
    "either 1,2 or 3,4": "4",
    "10,00": "0",
    "x = -3": "-3",
    "x = \N{MINUS SIGN}3": "-3",
    "-$5": "-5",
    "$-5$": "-5",
    "8-3": "3",
    "(2)-3": "3",
    "pages 10-12": "12",
    "50%": "50",
    r"50\%": "50",
    ".5": "0.5",
    "0.": "0",
    "1/2": "2",
    "72 then ...": "72",
    "007": "7",
    "the 3rd": "3",
    r"\boxed{42}": "42",
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_last_number(text: str, number: str | None) -> None:
    assert grade.last_number(text) == (None if number is None else Decimal(number))


@given(
    number=st.decimals(-(10**12), 10**12, places=2),
    before=st.text(),
    after=st.sampled_from(["", ".", " clips", "%", "\n"]),
)
def test_the_last_number_is_found_in_any_dress(number: Decimal, before: str, after: str) -> None:
    for written in (f"{number:f}", f"{number:,f}", f"{number:f}".replace("-", "\N{MINUS SIGN}")):
        assert grade.last_number(f"{before}\n= {written}{after}") == number


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    grade.last_number(text)
    grade.prediction(text)


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ("", None),
        ("I do not know", None),
        ("so it is 7, no, 8.", "8"),
        ("Answer: 3 apples.\nBye", "3 apples"),
        ("**Answer:** 3", "3"),
        ("Answer: 3\n#### 4", "4"),
        ("#### 4\nAnswer: 3", "4"),
        ("#### 1\n#### 2 left", "2 left"),
        ("####", None),
        ("#### \n5", "5"),
        (r"\boxed{1} #### 2", "1"),
        (r"\boxed{1}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{} so 3", "3"),
        (r"\boxed{3", "3"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{1{,}000.}", "1,000"),
        ("-1,000", "-1000"),
    ],
)
def test_prediction(text: str, prediction: str | None) -> None:
    assert grade.prediction(text) == prediction

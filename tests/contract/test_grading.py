"""Grades of real solutions, by verl's scorers and math-verify as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli.data.recipes import RECIPES
from flashrl_cli.evals import grade
from flashrl_cli.evals.graders import Graders
from flashrl_cli.evals.questions import Question
from flashrl_cli.evals.results import Grade, Response

pytestmark = pytest.mark.filterwarnings("ignore")


def solutions(folder: Path) -> list[tuple[Question, str]]:
    """GSM8K's test split: questions as prepared, each with its reference solution, the answer in a box, too."""
    lines = (folder / "test.jsonl").read_text(encoding="utf-8").split("\n")
    raws = [json.loads(line) for line in lines if line]
    rows = [RECIPES["gsm8k"].convert(raw, "test", number) for number, raw in enumerate(raws)]
    return [
        (
            Question([], row["data_source"], row["reward_model"]["ground_truth"], None),
            raw["answer"] + rf" so \boxed{{{raw['answer'].rpartition(' ')[2]}}}",
        )
        for row, raw in zip(rows, raws, strict=True)
    ]


def corrupted(question: Question, solution: str) -> str:
    """The solution with an answer of one more; the working still holds the right one."""
    head, _, _ = solution.rpartition("####")
    wrong = int(question.ground_truth) + 1
    return rf"{head}#### {wrong} so \boxed{{{wrong}}}"


def test_every_solution_of_gsm8k_is_right_and_every_corrupted_one_is_wrong(gsm8k: Path) -> None:
    work = solutions(gsm8k)
    assert len(work) == 1319
    right = [(one.correct, one.flexible, one.boxed, one.problem) for one in grade.grade_all(work)]
    assert set(right) == {(True, True, True, None)}
    wrong = grade.grade_all([(question, corrupted(question, solution)) for question, solution in work])
    assert {(one.correct, one.flexible, one.boxed, one.problem) for one in wrong} == {(False, False, False, None)}


@pytest.mark.parametrize(
    ("source", "truth", "response", "grades"),
    [
        ("openai/gsm8k", "72", "The answer is 72.", (False, True, False)),
        ("openai/gsm8k", "72", "#### 72.", (False, True, False)),
        ("HuggingFaceH4/MATH-500", r"\frac{1}{2}", r"\boxed{0.5}", (True, True, True)),
        ("HuggingFaceH4/MATH-500", r"\frac{1}{4}", r"\boxed{0.25}", (False, True, True)),
        ("HuggingFaceH4/MATH-500", "34", "The answer is $34$.", (False, True, False)),
        ("math_dapo", "34", "Answer: 34", (True, True, False)),
        ("math_dapo", "34", r"\boxed{34}", (True, True, True)),
        ("numina_olympiads", "x+1", r"\boxed{1+x}", (True, True, True)),
        ("numina_olympiads", "x+1", r"\boxed{2+x}", (False, False, False)),
    ],
)
def test_the_form_and_the_answer(source: str, truth: str, response: str, grades: tuple[bool, bool, bool]) -> None:
    (found,) = grade.grade_all([(Question([], source, truth, None), response)])
    assert (found.correct, found.flexible, found.boxed) == grades


def test_graders_grade_as_one_process_does(gsm8k: Path) -> None:
    """Among 300 responses one that sympy takes minutes for (verl does not), and one that verl checks in a process."""
    work = [(q, s if n % 3 else corrupted(q, s)) for n, (q, s) in enumerate(solutions(gsm8k)[:298])]
    work += [(Question([], "numina_olympiads", "x+1", None), r"\boxed{1+x}")]
    alone = grade.grade_all(work)
    hanging = (Question([], "math_dapo", "34", None), "\\boxed{9^{9^{9^{9}}}}\nAnswer: 34")
    work.insert(100, hanging)
    responses = [Response(question=n, sample=0, response=text, tokens=1, cut=False) for n, (_, text) in enumerate(work)]
    with Graders(workers=2) as graders:
        found = graders.grade([question for question, _ in work], responses)
    slow = found.pop(100)
    assert slow == Grade(
        score=1.0,
        correct=True,
        flexible=False,
        boxed=False,
        prediction="9^{9^{9^{9}}}",
        problem="grading took more than 5 s of a CPU",
    )
    assert found == alone

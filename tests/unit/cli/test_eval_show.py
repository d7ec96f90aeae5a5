"""`flashrl eval show`, as people and programs call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from flashrl_cli import paths
from flashrl_cli.cli.eval_show import show
from flashrl_cli.errors import FlashrlError, InputError
from flashrl_cli.evals import responses
from tests.graded import entry

Call = Callable[..., str]
FIRST, SECOND = "- - - + - -", "+ + + - + -"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """`call(*words)` runs the command in this process: its stdout."""
    app = typer.Typer(rich_markup_mode=None)
    app.command()(show)

    def run(*words: object) -> str:
        try:
            app([str(word) for word in words], standalone_mode=False)
        except FlashrlError:
            capsys.readouterr()
            raise
        return capsys.readouterr().out

    return run


def document(call: Call, *words: object) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(call(*words, "--json"))
    return loaded


@pytest.fixture
def folder() -> Path:
    """Steps 2 and 10 of run a, of which the second is better, on two data sets; run b has one step."""
    place = paths.checkpoints_root() / "p" / "a" / "eval"
    marks = {step: [[mark == "+"] for mark in text.split()] for step, text in ((2, FIRST), (10, SECOND))}
    entries = [entry("a", step, marks[step], name) for step in marks for name in ("gsm8k", "math")]
    responses.write(place / responses.FILE, [*entries, entry("b", 4, marks[2])])
    return place


def test_what_is_there_and_what_changed(folder: Path, call: Call) -> None:
    out = call()
    assert out.startswith("a on gsm8k; --run has 2: a, b; --dataset has 2: gsm8k, math\n")
    rows = [line.split() for line in out.splitlines()]
    assert ["2", "0.167", "1", "6", "0"] in rows
    assert ["10", "0.667", "4", "6", "0"] in rows
    assert (
        "From step 2 to step 10: 4 questions gained, 1 lost, 1 as before (p = 0.38 for these two steps alone)." in out
    )
    gained, _, lost = out.partition("LOST (answered right less often at step 10)")
    assert "GAINED (answered right more often at step 10)" in gained
    assert [line for line in gained.splitlines() if line.startswith("──")] == [
        f"── question {n}: step 2 wrong; step 10 right" for n in (1, 2, 3, 5)
    ]
    assert "── question 4: step 2 right; step 10 wrong" in lost
    assert "truth: 6" in lost


def test_changed_as_data(folder: Path, call: Call) -> None:
    found = document(call, folder, "--changed", 10, 2, "--limit", 1, "--dataset", "math")
    assert (found["schema_version"], found["view"], found["dataset"]) == (1, "changed", "math")
    assert found["counts"] == {"gained": 1, "lost": 4, "same": 1}
    assert [q["question"] for q in found["gained"]] == [4]
    assert [q["question"] for q in found["lost"]] == [1], "one of each kind"
    assert found["steps"][0] == {"step": 2, "accuracy": pytest.approx(1 / 6), "right": 1, "responses": 6, "cut": 0}


def test_only_some_are_shown(folder: Path, call: Call) -> None:
    assert "GAINED (answered right more often at step 10, 2 of 4)" in call("--limit", 2)


def test_worst(folder: Path, call: Call) -> None:
    out = call("--worst", "--limit", 1)
    assert "Of 6 questions 2 are not always answered right at step 10. The hardest 1:" in out
    assert "── question 6: step 10 wrong" in out
    assert "question 4" not in out
    assert "accuracy" not in out
    found = document(call, "--worst", "--step", 2)
    assert (found["step"], found["wrong"]) == (2, 5)
    assert [q["question"] for q in found["questions"]] == [6, 1, 2, 3, 5]


def test_question(folder: Path, call: Call) -> None:
    out = call("--question", 4)
    assert [line for line in out.splitlines() if line.startswith("step ")] == [
        "step 2: right · answer 6 · 2 tokens",
        "step 10: wrong · answer é · 2 tokens",
    ]
    assert "    I think\\u2028it is 6" in out
    (only,) = document(call, "--question", 4, "--step", 10)["questions"]
    assert [r["step"] for r in only["responses"]] == [10]


def test_another_run(folder: Path, call: Call) -> None:
    found = document(call, "--run", "b")
    assert (found["run"], found["view"]) == ("b", "summary")
    assert call("--run", "b").startswith("b on gsm8k; --run has 2")


def test_no_rise(tmp_path: Path, call: Call) -> None:
    responses.write(tmp_path / responses.FILE, [entry("a", 1, [[True]]), entry("a", 2, [[False]])])
    assert "No later step has a higher accuracy than the first." in call(tmp_path)
    assert document(call, tmp_path)["view"] == "summary"


def test_models_without_steps(tmp_path: Path, call: Call) -> None:
    responses.write(tmp_path / responses.FILE, [entry("hf", None, [[True, False]])])
    assert "Of 1 question 1 is not always answered right. The hardest 1:" in call(tmp_path, "--worst")
    assert "the model, sample 1: wrong" in call(tmp_path, "--worst")


STEPS = "steps there: 2, 10"


@pytest.mark.parametrize(
    ("words", "match", "hint"),
    [
        ("--worst --question 1", "three views", "give one of them"),
        ("--worst --changed 2 10", "three views", "give one of them"),
        ("--step 2", "--step goes with", "--changed names both steps"),
        ("--changed 2 10 --step 2", "--step goes with", "--changed names both steps"),
        ("--changed 2 3", "step 3 of a is not in", STEPS),
        ("--worst --step 3", "step 3 of a is not in", STEPS),
        ("--question 7", "no question 7", "from 1 to 6"),
        ("--run c", "no run c", "there: a, b"),
        ("--dataset c", "no data set c", "there: gsm8k, math"),
    ],
)
def test_bad_input(words: str, match: str, hint: str, folder: Path, call: Call) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call(folder, *words.split())
    assert caught.value.hint == hint

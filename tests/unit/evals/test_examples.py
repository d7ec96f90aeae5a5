"""Which responses are worth reading."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from flashrl_cli import paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.evals import examples, results
from flashrl_cli.evals.examples import View
from flashrl_cli.evals.stats import mcnemar
from flashrl_cli.evals.verdicts import Entry
from tests.graded import entry

Marks = Sequence[Sequence[bool]]


def marks(text: str) -> list[list[bool]]:
    """`"+ - +-"`: a word a question, + a right sample."""
    return [[mark == "+" for mark in word] for word in text.split()]


def written(folder: Path, *entries: Entry) -> Path:
    file = folder / results.FILE
    results.write(file, entries)
    return file


def seen(folder: Path, **steps: str) -> View:
    made = [entry("a", int(step.removeprefix("s")), marks(text)) for step, text in steps.items()]
    return examples.view(written(folder, *made), None, None)


def test_view(tmp_path: Path) -> None:
    view = seen(tmp_path, s10="+ + -", s9="+ - -", s20="- + +")
    assert list(view.marks) == [9, 10, 20]
    assert (view.first, view.best) == (9, 20)
    assert [round(view.accuracy(step), 2) for step in view.marks] == [0.33, 0.67, 0.67]
    assert view.checked(9) == 9
    with pytest.raises(InputError, match="step 3 of a is not in") as caught:
        view.checked(3)
    assert caught.value.hint == "steps there: 9, 10, 20"


def test_runs_and_data_sets(tmp_path: Path) -> None:
    one = [entry("hf", None, marks("+ -"))]
    two = [entry("a", step, marks("+ -"), name) for step in (1, 2) for name in ("math", "gsm8k")]
    file = written(tmp_path, *one, *two)
    view = examples.view(file, None, None)
    assert (view.run, view.runs, view.dataset, view.datasets) == ("a", ("hf", "a"), "math", ("math", "gsm8k"))
    assert examples.view(file, "hf", None).dataset == "gsm8k"
    assert examples.view(file, "a", "gsm8k").dataset == "gsm8k"
    with pytest.raises(InputError, match="no run b in"):
        examples.view(file, "b", None)
    with pytest.raises(InputError, match="no data set math in"):
        examples.view(file, "hf", "math")


def test_a_file_without_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no responses"):
        examples.view(written(tmp_path), None, None)


def test_the_worst_are_those_that_fewest_responses_get_right_there_and_then_anywhere(tmp_path: Path) -> None:
    view = seen(tmp_path, s1="+- -- ++ -- --", s2="-- -- ++ +- --", s3="-- -- ++ +- +-")
    assert examples.worst(view, 3) == [2, 1, 5, 4]
    assert examples.worst(view, 1) == [2, 5, 4, 1]


def test_changed(tmp_path: Path) -> None:
    view = seen(tmp_path, s1="- - - - + + -", s2="+ + + + - + -")
    what = examples.changed(view, 1, 2)
    assert (what.gained, what.lost, what.same) == ((1, 2, 3, 4), (5,), 2)
    assert what.p == mcnemar(4, 1)
    back = examples.changed(view, 2, 1)
    assert (back.gained, back.lost, back.p) == (what.lost, what.gained, what.p)


def test_the_largest_changes_come_first(tmp_path: Path) -> None:
    view = seen(tmp_path, s1="-- -- ++ ++", s2="+- ++ +- --")
    what = examples.changed(view, 1, 2)
    assert (what.gained, what.lost) == ((2, 1), (4, 3))


def test_other_questions_are_refused(tmp_path: Path) -> None:
    view = seen(tmp_path, s1="- -", s2="+")
    with pytest.raises(InputError, match="steps 1 and 2 did not answer the same questions"):
        examples.changed(view, 1, 2)


def test_questions_show_what_tells_most(tmp_path: Path) -> None:
    """A right response where there are more of them, a wrong one where there are fewer."""
    view = seen(tmp_path, s1="+-- +++", s2="-++ ++-")
    (first,) = examples.questions(view, [1], [1, 2], telling=True)
    assert first["prompt"] == "gsm8k: 0 + 0?"
    assert first["ground_truth"] == "0"
    assert first["right"] == [{"step": 1, "right": 1, "of": 3}, {"step": 2, "right": 2, "of": 3}]
    assert [(r["step"], r["sample"], r["correct"]) for r in first["responses"]] == [(1, 1, False), (2, 1, True)]
    (second,) = examples.questions(view, [2], [2], telling=True)
    assert [(r["sample"], r["correct"]) for r in second["responses"]] == [(2, False)], "of one step a wrong one"
    (whole,) = examples.questions(view, [2], [1, 2], telling=False)
    assert [(r["step"], r["sample"]) for r in whole["responses"]] == [(s, n) for s in (1, 2) for n in range(3)]
    assert [q["question"] for q in examples.questions(view, [2, 1], [1], telling=True)] == [2, 1]
    assert examples.questions(view, [], [1], telling=True) == []


def test_a_question_that_was_not_asked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no question 9") as caught:
        examples.questions(seen(tmp_path, s1="+ -"), [9], [1], telling=False)
    assert caught.value.hint == "from 1 to 2"


def test_places(tmp_path: Path) -> None:
    file = written(tmp_path / "run" / "eval", entry("a", 1, [[True]]))
    for where in (file, file.parent, file.parent.parent):
        assert examples.find(str(where)) == file
    with pytest.raises(NothingMatched, match=r"no responses\.parquet in"):
        examples.find(str(tmp_path))


def test_the_newest_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NothingMatched):
        examples.find(None)
    root = paths.checkpoints_root()
    places = [root / "eval", root / "p" / "eval", root / "p" / "r" / "eval", tmp_path / "eval"]
    for age, place in enumerate(places):
        file = written(place, entry("a", 1, [[True]]))
        os.utime(file, (10_000 - age, 10_000 - age))
    for place in places:
        newest = place / results.FILE
        os.utime(newest, (20_000 + places.index(place), 20_000 + places.index(place)))
        assert examples.find(None) == newest

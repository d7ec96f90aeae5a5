"""Responses on disk: lines that come as questions are answered, the file of an evaluation, and what is read of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flashrl_cli import paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.evals import responses, results
from flashrl_cli.evals.responses import View
from flashrl_cli.evals.results import Entry, Response
from flashrl_cli.evals.stats import mcnemar
from tests.graded import entry, single

HARD = "a\u2028b\x85c\n\r\td \ud7ff"


def samples(question: int, count: int = 2) -> list[Response]:
    return [Response(question=question, sample=s, response=f"{HARD} {s}", tokens=3, cut=False) for s in range(count)]


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert results.read_answers(file) == {}
    for question in (4, 0, 2):
        results.append(file, samples(question))
    assert results.read_answers(file) == {question: samples(question) for question in (4, 0, 2)}


def test_a_cut_at_any_byte_loses_the_last_question_only(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    results.append(file, samples(1))
    whole = file.read_bytes()
    results.append(file, samples(7))
    both = file.read_bytes()
    for end in range(len(whole), len(both)):
        file.write_bytes(both[:end])
        assert results.read_answers(file) == {1: samples(1)}
        assert file.read_bytes() == whole, "what comes next begins on a line of its own"
    results.append(file, samples(7))
    assert set(results.read_answers(file)) == {1, 7}


def test_rows_can_be_chosen_and_columns_too(tmp_path: Path) -> None:
    file = tmp_path / responses.FILE
    responses.write(
        file, [entry("a", 1, single(2, 2)), entry("a", 1, single(1, 1), "math"), entry("b", None, [[True]])]
    )
    assert responses.read(file, ("question", "correct"), run="a", dataset="gsm8k", question=[1, 3]) == [
        {"question": 1, "correct": True},
        {"question": 3, "correct": False},
    ]
    assert [row["step"] for row in responses.read(file, run="b")] == [None]
    assert len(responses.read(file)) == 7


@pytest.mark.parametrize("content", [b"", b"step,score\n"])
def test_what_is_no_parquet_file_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.parquet cannot be read"):
        responses.read(file)


def test_files_without_responses_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "test.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "run": ["b"]}), file)
    with pytest.raises(InputError, match=r"test\.parquet"):
        responses.read(file)
    with pytest.raises(InputError, match=r"test\.parquet"):
        responses.read(file, run="b", question=[1])
    with pytest.raises(InputError, match="holds no responses"):
        responses.view(written(tmp_path), None, None)


def test_prompts_as_text() -> None:
    assert responses.text_of([{"role": "user", "content": "1 + 1?"}]) == "1 + 1?"
    parts = [{"type": "image"}, {"type": "text", "text": "é"}]
    assert responses.text_of([{"role": "system", "content": "Think."}, {"role": "user", "content": parts}]) == (
        '[system]\nThink.\n\n[user]\n[{"type": "image"}, {"type": "text", "text": "é"}]'
    )


def marks(text: str) -> list[list[bool]]:
    """`"+ - +-"`: a word a question, + a right sample."""
    return [[mark == "+" for mark in word] for word in text.split()]


def written(folder: Path, *entries: Entry) -> Path:
    file = folder / responses.FILE
    responses.write(file, entries)
    return file


def seen(folder: Path, **steps: str) -> View:
    made = [entry("a", int(step.removeprefix("s")), marks(text)) for step, text in steps.items()]
    return responses.view(written(folder, *made), None, None)


def test_view(tmp_path: Path) -> None:
    view = seen(tmp_path, s10="+ + -", s9="+ - -", s20="- + +")
    assert list(view.marks) == [9, 10, 20]
    assert (view.first, view.best) == (9, 20)
    assert [round(view.accuracy(step), 2) for step in view.marks] == [0.33, 0.67, 0.67]
    assert view.checked(9) == 9


def test_runs_and_data_sets(tmp_path: Path) -> None:
    one = [entry("hf", None, marks("+ -"))]
    two = [entry("a", step, marks("+ -"), name) for step in (1, 2) for name in ("math", "gsm8k")]
    file = written(tmp_path, *one, *two)
    view = responses.view(file, None, None)
    assert (view.run, view.runs, view.dataset, view.datasets) == ("a", ("hf", "a"), "math", ("math", "gsm8k"))
    assert responses.view(file, "hf", None).dataset == "gsm8k"
    assert responses.view(file, "a", "gsm8k").dataset == "gsm8k"
    with pytest.raises(InputError, match="no data set math in"):
        responses.view(file, "hf", "math")


def test_the_worst_are_those_that_fewest_responses_get_right_there_and_then_anywhere(tmp_path: Path) -> None:
    view = seen(tmp_path, s1="+- -- ++ -- --", s2="-- -- ++ +- --", s3="-- -- ++ +- +-")
    assert responses.worst(view, 3) == [2, 1, 5, 4]
    assert responses.worst(view, 1) == [2, 5, 4, 1]


def test_changed(tmp_path: Path) -> None:
    """The largest changes first."""
    view = seen(tmp_path, s1="- - - - + + -", s2="+ + + + - + -", s3="-", s4="-- -- ++ ++", s5="+- ++ +- --")
    what = responses.changed(view, 1, 2)
    assert (what.gained, what.lost, what.same) == ((1, 2, 3, 4), (5,), 2)
    assert what.p == mcnemar(4, 1)
    back = responses.changed(view, 2, 1)
    assert (back.gained, back.lost, back.p) == (what.lost, what.gained, what.p)
    several = responses.changed(view, 4, 5)
    assert (several.gained, several.lost) == ((2, 1), (4, 3))
    with pytest.raises(InputError, match="steps 1 and 3 did not answer the same questions"):
        responses.changed(view, 1, 3)


def test_questions_show_what_tells_most(tmp_path: Path) -> None:
    """A right response where there are more of them, a wrong one where there are fewer."""
    view = seen(tmp_path, s1="+-- +++", s2="-++ ++-")
    (first,) = responses.questions(view, [1], [1, 2], brief=True)
    assert first["prompt"] == "gsm8k: 0 + 0?"
    assert first["ground_truth"] == "0"
    assert first["right"] == [{"step": 1, "right": 1, "of": 3}, {"step": 2, "right": 2, "of": 3}]
    assert [(r["step"], r["sample"], r["correct"]) for r in first["responses"]] == [(1, 1, False), (2, 1, True)]
    (second,) = responses.questions(view, [2], [2], brief=True)
    assert [(r["sample"], r["correct"]) for r in second["responses"]] == [(2, False)], "of one step a wrong one"
    (whole,) = responses.questions(view, [2], [1, 2], brief=False)
    assert [(r["step"], r["sample"]) for r in whole["responses"]] == [(s, n) for s in (1, 2) for n in range(3)]
    assert [q["question"] for q in responses.questions(view, [2, 1], [1], brief=True)] == [2, 1]
    assert responses.questions(view, [], [1], brief=True) == []


def test_places(tmp_path: Path) -> None:
    file = written(tmp_path / "run" / "eval", entry("a", 1, [[True]]))
    for where in (file, file.parent, file.parent.parent):
        assert responses.find(str(where)) == file
    with pytest.raises(NothingMatched, match=r"no responses\.parquet in"):
        responses.find(str(tmp_path))


def test_the_newest_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NothingMatched):
        responses.find(None)
    root = paths.checkpoints_root()
    places = [root / "eval", root / "p" / "eval", root / "p" / "r" / "eval", tmp_path / "eval"]
    for age, place in enumerate(places):
        file = written(place, entry("a", 1, [[True]]))
        os.utime(file, (10_000 - age, 10_000 - age))
    for place in places:
        newest = place / responses.FILE
        os.utime(newest, (20_000 + places.index(place), 20_000 + places.index(place)))
        assert responses.find(None) == newest

"""A training whose rows no answer can be paid for is refused before it starts.

verl's scorers compare text: a truth of another type gives reward 0 for ever, without an error. Tried around it, in
train and validation files, as Parquet, JSON lines and JSON: whole numbers, numbers, true and false, lists, objects,
null, empty text, blanks, text with blanks at its end, a truth that is missing, several files that are wrong, and one
that is both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.data import truths
from flashrl_cli.errors import EnvironmentNotReady, InputError, Problem
from flashrl_cli.machine.finding import fail
from flashrl_cli.train import preflight
from flashrl_cli.train.preflight import row_problems
from tests import sample_rows
from tests.sample_rows import row, truth

FORMATS = ("parquet", "jsonl", "json")
UNPAYABLE = {
    "int": 2, "float": 2.0, "bool": True, "list": ["2"], "dict": {"a": "2"}, "null": None, "empty": "", "blank": " \n",
    "trailing blank": "2 ", "separators": "1,080", "missing": ...,
}  # fmt: skip


def found(*sets: str) -> list[Problem]:
    return row_problems(load_spec("tiny", sets=sets).spec)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(name, *rows)` writes a file below the test's folder."""
    return lambda name, *rows: sample_rows.write(tmp_path / name, rows)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", UNPAYABLE.values(), ids=UNPAYABLE)
@pytest.mark.parametrize("key", ["data.train", "data.val"])
def test_truths_that_no_answer_can_match_are_refused_with_file_and_row(
    key: str, value: Any, form: str, write: Callable[..., Path]
) -> None:
    bad, good = write(f"bad.{form}", *[row(**truth(value))] * 7), write(f"good.{form}", row(), row())
    other = {"data.train": "data.val", "data.val": "data.train"}[key]
    [problem] = found(f"{key}={bad}", f"{other}={good}")
    first = {"parquet": "row 1", "jsonl": "1", "json": "2"}[form]
    assert problem.where == f"{bad}:{first}"
    assert "ground_truth" in problem.message
    assert "7 rows: " in problem.message
    assert problem.hint


@pytest.mark.parametrize("form", FORMATS)
def test_good_rows_of_every_format(form: str, write: Callable[..., Path]) -> None:
    file = write(f"good.{form}", row(1), row(2))
    assert found(f"data.train={file}", f"data.val={file}") == []


def test_all_rows_of_all_files_are_judged_and_each_file_once(write: Callable[..., Path]) -> None:
    one = write("a.parquet", *[row(n) for n in range(1, 5000)], row(**truth("2 ")))
    two = write("b.jsonl", row(), row(**truth(None)), row(prompt="?"))
    first, *rest = found(f"data.train={one}", f"data.val={two}")
    assert first.where == f"{one}:row 5000"
    assert [(p.where, p.message) for p in rest] == [
        (f"{two}:2", "reward_model.ground_truth is null, not text"),
        (f"{two}:3", "prompt is text, not a list of messages: '?'"),
    ]
    assert len(found(f"data.train={two}", f"data.val={two}")) == 2


def test_rows_of_json_that_arrow_would_not_load(write: Callable[..., Path]) -> None:
    """`datasets` gives each column one type: Parquet has it, JSON need not."""
    file = write(
        "a.jsonl", row(extra_info={"index": 1}), row(extra_info={"index": "u"}), row(extra_info={"index": 2**64})
    )
    assert [(p.where, p.message.partition(":")[0]) for p in found(f"data.train={file}", f"data.val={file}")] == [
        (f"{file}:2", f"extra_info.index is text, and a whole number in {file}"),
        (f"{file}:3", "extra_info.index is a whole number of more than 64 bits"),
    ]


@pytest.mark.parametrize("content", [b"no parquet", b""])
def test_a_file_that_is_no_parquet(content: bytes, tmp_path: Path, write: Callable[..., Path]) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    [problem] = found(f"data.train={tmp_path}/a.parquet", f"data.val={write('b.jsonl', row())}")
    assert "cannot read" in problem.message


def test_files_without_rows_or_columns_or_of_another_format(tmp_path: Path, write: Callable[..., Path]) -> None:
    empty, lacking, good = (
        write("a.jsonl"),
        write("b.parquet", {"question": "?", "answer": "1"}),
        write("c.json", row()),
    )
    (tmp_path / "d.csv").write_text("a,b\n")
    assert found(f"data.train={empty}", f"data.val={lacking}")[0].message == "holds no rows"
    assert (
        "lacks the column data_source, prompt, reward_model"
        in found(f"data.train={lacking}", f"data.val={good}")[0].message
    )
    assert "known formats" in str(found(f"data.train={tmp_path}/d.csv", f"data.val={good}")[0].hint)


def test_a_reward_of_ones_own_takes_other_truths_and_sources(write: Callable[..., Path]) -> None:
    file = write("a.parquet", row(**truth(["2"], "my/own")))
    data = (f"data.train={file}", f"data.val={file}")
    assert len(found(*data)) == 2
    assert found(*data, "verl.reward.custom_reward_function.path=/r.py") == []
    assert found(*data, "verl.reward.reward_model.enable=true") == []
    other = write(
        "b.parquet", {key: value for key, value in row().items() if key != "prompt"} | {"ask": row()["prompt"]}
    )
    data = (f"data.train={other}", f"data.val={other}")
    assert found(*data, "verl.data.prompt_key=ask") == []
    assert found(f"data.train={write('c.parquet', {'x': 1})}", data[1], "verl.data.custom_cls.path=/d.py") == []


def test_bad_rows_alone_are_an_input_error_and_otherwise_come_after_what_the_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]
) -> None:
    file = write("a.parquet", row(**truth(2)))
    spec = load_spec("tiny", sets=[f"data.train={file}", f"data.val={file}"]).spec
    plan: Any = SimpleNamespace(spec=spec, preset="tiny")
    monkeypatch.setattr(preflight, "_machine", lambda *_: iter(()))
    with pytest.raises(InputError, match="cannot be trained on these rows; nothing was started") as caught:
        preflight.check(plan)
    assert [problem.where for problem in caught.value.problems] == [f"{file}:row 1"]
    monkeypatch.setattr(preflight, "_machine", lambda *_: iter([fail("ray", "ray is not installed")]))
    with pytest.raises(EnvironmentNotReady) as both:
        preflight.check(plan)
    assert [problem.where for problem in both.value.problems] == ["ray", f"{file}:row 1"]


def test_of_twenty_thousand_rows_each_truth_is_scored_once(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take half a second."""
    scored: list[Any] = []
    verdict = truths.verdict

    def counted(source: str, one: Any) -> str | None:
        scored.append(one)
        return verdict(source, one)

    monkeypatch.setattr(truths, "verdict", counted)
    file = write("a.parquet", *[row(n % 100) for n in range(20_000)])
    assert found(f"data.train={file}", f"data.val={file}") == []
    assert len(scored) == 100

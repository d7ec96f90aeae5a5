"""A training on rows that no answer can be paid for is refused before it starts; tests/unit/data says which those are.

verl's scorers compare text: a truth of another type gives reward 0 for ever, without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.data import truths
from flashrl_cli.errors import EnvironmentNotReady, InputError, Problem
from flashrl_cli.machine.finding import fail
from flashrl_cli.train import preflight
from tests import sample_rows
from tests.sample_rows import row, truth
from tests.specs import load_spec

FORMATS = {"parquet": "row 1", "jsonl": "1", "json": "2"}
"""Formats of data files, and the place of the first row in each."""
Write = Callable[..., Path]


def found(train: Path | str, val: Path | str, *sets: str) -> list[tuple[str, str, str | None]]:
    """Place, message and hint of each problem with the rows of a run."""
    spec = load_spec("tiny", sets=[f"data.train={train}", f"data.val={val}", *sets]).spec
    return [(str(p.where), p.message, p.hint) for p in preflight.row_problems(spec)]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, *rows)` writes a file below the test's folder."""
    return lambda name, *rows: sample_rows.write(tmp_path / name, rows)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [2, "2 ", ["2"], None, ...], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_bad_truths_are_refused_with_file_and_row(value: Any, form: str, swapped: bool, write: Write) -> None:
    bad, good = write(f"bad.{form}", *[row(**truth(value))] * 7), write(f"good.{form}", row(1), row(2))
    assert found(good, good) == []
    [(where, message, hint)] = found(*((good, bad) if swapped else (bad, good)))
    assert where == f"{bad}:{FORMATS[form]}"
    assert "ground_truth" in message
    assert "7 rows: " in message
    assert hint


def test_rows_of_every_data_set_of_a_list_are_judged(write: Write) -> None:
    good, bad = write("a.parquet", row()), write("b.jsonl", row(**truth(None)))
    assert [where for where, *_ in found(f"[{good},{bad}]", f"[{good}]")] == [f"{bad}:1"]


def test_all_rows_of_all_files_are_judged_and_each_file_once(write: Write) -> None:
    one = write("a.parquet", *[row(n) for n in range(1, 5000)], row(**truth("2 ")))
    two = write("b.jsonl", row(), row(**truth(None)), row(prompt="?"))
    first, *rest = found(one, two)
    assert first[0] == f"{one}:row 5000"
    assert [problem[:2] for problem in rest] == [
        (f"{two}:2", "reward_model.ground_truth is null, not text"),
        (f"{two}:3", "prompt is text, not a list of messages: '?'"),
    ]
    assert len(found(two, two)) == 2


def test_rows_of_json_that_arrow_would_not_load(write: Write) -> None:
    """`datasets` gives each column one type: Parquet has it, JSON need not."""
    file = write("a.jsonl", *(row(extra_info={"index": index}) for index in (1, "u", 2**64)))
    assert [(where, message.partition(":")[0]) for where, message, _ in found(file, file)] == [
        (f"{file}:2", f"extra_info.index is text, and a whole number in {file}"),
        (f"{file}:3", "extra_info.index is a whole number of more than 64 bits"),
    ]


def test_files_that_hold_no_such_rows(tmp_path: Path, write: Write) -> None:
    good = write("good.json", row())
    for number, content in enumerate((b"no parquet", b"")):
        (tmp_path / f"{number}.parquet").write_bytes(content)
        [(_, message, _)] = found(tmp_path / f"{number}.parquet", good)
        assert "cannot read" in message
    (tmp_path / "d.csv").write_text("a,b\n")
    assert "known formats" in str(found(tmp_path / "d.csv", good)[0][2])
    assert found(write("a.jsonl"), good)[0][1] == "holds no rows"
    lacking = write("b.parquet", {"question": "?", "answer": "1"})
    assert "lacks the column data_source, prompt, reward_model" in found(lacking, good)[0][1]


def test_a_preset_may_bring_its_own_reward_prompts_and_data_set(write: Write) -> None:
    file = write("a.parquet", row(**truth(["2"], "my/own")))
    assert len(found(file, file)) == 2
    assert found(file, file, "verl.reward.custom_reward_function.path=/r.py") == []
    assert found(file, file, "verl.reward.reward_model.enable=true") == []
    columns = {key: value for key, value in row().items() if key != "prompt"}
    asking = write("b.parquet", columns | {"ask": row()["prompt"]})
    assert found(asking, asking, "verl.data.prompt_key=ask") == []
    assert found(write("c.parquet", {"x": 1}), asking, "verl.data.custom_cls.path=/d.py") == []


def test_bad_rows_alone_are_an_input_error_and_otherwise_come_after_what_the_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    file = write("a.parquet", row(**truth(2)))
    spec = load_spec("tiny", sets=[f"data.train={file}", f"data.val={file}"]).spec
    plan: Any = SimpleNamespace(spec=spec, preset="tiny")
    monkeypatch.setattr(preflight, "_machine", lambda *_: iter(()))
    for check in (preflight.check, preflight.check_rows):
        with pytest.raises(InputError, match="cannot be trained on these rows; nothing was started") as caught:
            check(plan)
        assert places(caught.value.problems) == [f"{file}:row 1"]
    monkeypatch.setattr(preflight, "_machine", lambda *_: iter([fail("ray", "ray is not installed")]))
    with pytest.raises(EnvironmentNotReady) as both:
        preflight.check(plan)
    assert places(both.value.problems) == ["ray", f"{file}:row 1"]


def places(problems: tuple[Problem, ...]) -> list[str]:
    return [str(problem.where) for problem in problems]


def test_of_twenty_thousand_rows_each_truth_is_scored_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half a second."""
    scored: list[Any] = []
    verdict = truths.verdict

    def counted(source: str, one: Any) -> str | None:
        scored.append(one)
        return verdict(source, one)

    monkeypatch.setattr(truths, "verdict", counted)
    file = write("a.parquet", *[row(n % 100) for n in range(20_000)])
    assert found(file, file) == []
    assert len(scored) == 100

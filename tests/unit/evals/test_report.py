"""Rows, table, curves and files of an outcome."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from flashrl_cli.evals.job import Sampling
from flashrl_cli.evals.report import Report
from flashrl_cli.evals.request import Request
from flashrl_cli.evals.run import Evaluated, Outcome
from flashrl_cli.evals.stats import wilson
from flashrl_cli.runs.checkpoints import Checkpoint, Skipped


def checkpoint(run: str, step: int | None) -> Checkpoint:
    source = Path("/checkpoints") / run
    return Checkpoint(source=source, step=step, hf=source / f"global_step_{step}", run=run)


def evaluated(of: Checkpoint, *correct: list[bool]) -> Evaluated:
    responses = [
        {"question": q, "sample": s, "response": "é\u2028", "tokens": 2 + s, "cut": s > 0, "score": 1.0, "correct": one}
        for q, samples in enumerate(correct)
        for s, one in enumerate(samples)
    ]
    return Evaluated(checkpoint=of, responses=responses, holds={"precision": "bf16"}, seconds=1.5)


def report(*results: Evaluated, base: Checkpoint | None = None, skipped: tuple[Skipped, ...] = ()) -> Report:
    request = Request(
        checkpoints=tuple(r.checkpoint for r in results),
        base=base,
        skipped=skipped,
        data=(Path("/test.parquet"),),
        questions=(),
        sampling=Sampling(n=2),
        rollout="bf16",
        max_model_len=None,
        folder=Path("/unused"),
    )
    return Report.of(request, Outcome(results, (Skipped(Path("/late"), "torn"),), 9.5))


def test_row() -> None:
    (row,) = report(evaluated(checkpoint("a", 4), [True, True], [False, False], [True, False])).rows
    assert (row.run, row.step, row.accuracy, row.n, row.prompts) == ("a", 4, 0.5, 6, 3)
    assert row.mean_length == 2.5
    assert row.cut_share == 0.5
    assert row.lo < wilson(0.5, 6)[0], "samples of one prompt are no independent trials"


def test_base_is_step_0_of_every_run() -> None:
    base = checkpoint("start", None)
    steps = [evaluated(checkpoint(run, step), [True]) for run, step in (("b", 10), ("a", 10), ("a", 9))]
    rows = report(evaluated(base, [False]), *steps, base=base).rows
    assert [(r.run, r.step, r.accuracy) for r in rows] == [
        ("a", 0, 0.0),
        ("a", 9, 1.0),
        ("a", 10, 1.0),
        ("b", 0, 0.0),
        ("b", 10, 1.0),
    ]


def test_base_beside_hf_folders_is_a_row_of_its_own() -> None:
    base, other = checkpoint("start", None), checkpoint("other", None)
    rows = report(evaluated(base, [False]), evaluated(other, [True]), base=base).rows
    assert [(r.run, r.step) for r in rows] == [("other", None), ("start", 0)]


def test_curves_need_two_steps() -> None:
    results = [evaluated(checkpoint(run, step), [True], [False]) for run, step in (("a", 1), ("a", 2), ("b", 1))]
    (curve,) = report(*results, evaluated(checkpoint("hf", None), [True])).curves()
    assert curve["label"] == "a"
    assert (curve["xs"], curve["ys"]) == ([1, 2], [0.5, 0.5])
    assert curve["los"][0] < 0.5 < curve["his"][0]


def test_table_has_a_cell_for_every_column() -> None:
    columns, cells = report(evaluated(checkpoint("a", 4), [True])).table()
    assert [len(row) for row in cells] == [len(columns)]
    assert cells[0][:4] == ["a", 4, "1.000", "0.207 – 1.000"]


def test_files(tmp_path: Path) -> None:
    early = (Skipped(Path("/early"), "pruned"),)
    made = report(
        evaluated(checkpoint("a", 2), [True, False]), evaluated(checkpoint("a", 10), [True, True]), skipped=early
    )
    made.write(tmp_path)
    rows = list(csv.DictReader((tmp_path / "eval.csv").read_text().splitlines()))
    assert [(row["run"], int(row["step"]), float(row["accuracy"])) for row in rows] == [("a", 2, 0.5), ("a", 10, 1.0)]
    assert list(rows[0]) == ["run", "step", "accuracy", "lo", "hi", "n"]
    document = json.loads((tmp_path / "eval.json").read_text())
    assert document["schema_version"] == 1
    assert document["engine"] == {"precision": "bf16"}
    assert document["sampling"]["n"] == 2
    assert [s["reason"] for s in document["skipped"]] == ["pruned", "torn"]
    assert document["results"][1]["accuracy"] == pytest.approx(1.0)
    lines = (tmp_path / "responses.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert [json.loads(line)["step"] for line in lines] == [2, 2, 10, 10]

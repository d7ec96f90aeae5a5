"""Rows, table, curves and files of an evaluation."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flashrl_cli.errors import RunFailed
from flashrl_cli.evals import responses
from flashrl_cli.evals.accuracy import Report
from flashrl_cli.evals.results import Evaluated
from flashrl_cli.evals.stats import mcnemar, wilson
from flashrl_cli.render.tables import table as rich_table
from flashrl_cli.runs.checkpoints import Checkpoint, Skipped
from tests.graded import checkpoint, evaluated, single

SETTINGS = {"sampling": {"n": 2}, "rollout": "bf16"}


def report(*results: Evaluated, base: Checkpoint | None = None, baseline: Checkpoint | None = None) -> Report:
    skipped = [Skipped(Path("/late"), "torn")]
    return Report.of(results, base=base, baseline=baseline, skipped=skipped, settings=SETTINGS, seconds=9.5)


def ours(right: Sequence[int], dataset: str = "gsm8k") -> list[Evaluated]:
    return [evaluated(checkpoint("a", 10 * n), single(one, 100 - one), dataset) for n, one in enumerate(right)]


def test_row_of_several_samples() -> None:
    correct = [[True, True], [False, False], [True, False]]
    (row,) = report(evaluated(checkpoint("a", 4), correct)).rows
    assert (row.run, row.step, row.dataset, row.accuracy, row.n, row.prompts) == ("a", 4, "gsm8k", 0.5, 6, 3)
    assert row.mean_length == 2.5
    assert row.cut_share == 0.5
    assert row.lo < wilson(0.5, 6)[0], "samples of one prompt are no independent trials"
    assert row.pass_at == {1: pytest.approx(0.5), 2: pytest.approx(2 / 3)}
    assert row.maj == pytest.approx(1.5 / 3)
    assert (row.flexible, row.boxed, row.problems) == (None, None, 0)


def test_a_checkpoint_that_was_refused_makes_the_command_fail() -> None:
    """Those that were passed over for other reasons (a critic, a save that goes on) do not."""
    found = report(evaluated(checkpoint("a", 4), single(1, 3)))
    found.require_all()
    refused = (Skipped(Path("/a"), "missing 1 tensor", refused=True), Skipped(Path("/b"), "torn", refused=True))
    with pytest.raises(RunFailed, match="2 checkpoints were refused and have no result: /a, /b"):
        dataclasses.replace(found, skipped=refused).require_all()
    with pytest.raises(RunFailed, match="1 checkpoint was refused and has no result: /a"):
        dataclasses.replace(found, skipped=(refused[0], *found.skipped)).require_all()


def test_row_of_one_sample() -> None:
    (row,) = report(evaluated(checkpoint("a", 4), single(1, 3), flexible=True, boxed=False, problem="no verdict")).rows
    assert (row.accuracy, row.flexible, row.boxed, row.problems) == (0.25, 1.0, 0.0, 4)
    assert (row.pass_at, row.maj) == ({}, None)


def test_the_majority_is_judged_by_the_flexible_extractor_where_there_is_one() -> None:
    wrong_form = evaluated(checkpoint("a", 4), [[False, False]], flexible=True)
    assert report(wrong_form).rows[0].maj == 1.0
    assert report(evaluated(checkpoint("a", 4), [[True, True]], flexible=False)).rows[0].maj == 0.0


def test_base_is_step_0_of_every_run() -> None:
    base = checkpoint("start", None)
    steps = [evaluated(checkpoint(run, step), single(1, 0)) for run, step in (("b", 10), ("a", 10), ("a", 9))]
    made = report(evaluated(base, single(0, 1)), *steps, base=base)
    assert [(r.run, r.step, r.accuracy) for r in made.rows] == [
        ("a", 0, 0.0),
        ("a", 9, 1.0),
        ("a", 10, 1.0),
        ("b", 0, 0.0),
        ("b", 10, 1.0),
    ]
    firsts = [(c.run, c.best_step, c.other_step) for c in made.comparisons if c.against == "first"]
    assert firsts == [("a", 10, 0), ("b", 10, 0)]


def test_base_beside_hf_folders_is_a_row_of_its_own_and_they_are_compared_with_it() -> None:
    base, other = checkpoint("start", None), checkpoint("other", None)
    made = report(evaluated(base, single(10, 90)), evaluated(other, single(50, 50)), base=base)
    assert [(r.run, r.step) for r in made.rows] == [("other", None), ("start", 0)]
    assert [(c.run, c.best, c.other) for c in made.comparisons] == [("other", "the model", "start step 0")]
    assert made.verdicts[0].startswith("gsm8k: the model beats start step 0 by 40.0 points")


def test_a_base_that_is_better_than_a_model() -> None:
    base = checkpoint("start", None)
    others = [evaluated(checkpoint(name, None), single(10, 90)) for name in ("other", "third")]
    made = report(evaluated(base, single(50, 50)), *others, base=base)
    assert [(c.run, c.best, c.other) for c in made.comparisons if c.against != "model"] == [
        ("other", "start step 0", "the model"),
        ("third", "start step 0", "the model"),
    ]
    assert made.verdicts[0] == "other, gsm8k: start step 0, the first, has the highest accuracy"
    assert made.verdicts[1].startswith("other, gsm8k: start step 0 beats the model by 40.0 points")


def test_baseline() -> None:
    baseline = checkpoint("theirs", None)
    results = [evaluated(baseline, single(20, 80)), *ours((30, 60))]
    made = report(*results, baseline=baseline)
    assert [(r.run, r.step) for r in made.rows] == [("a", 0), ("a", 10), ("theirs", None)]
    (found,) = [c for c in made.comparisons if c.against == "baseline"]
    assert (found.run, found.other) == ("a", "theirs")
    assert found.difference.value == pytest.approx(0.4)


def test_data_sets_are_kept_apart_in_the_order_asked_for() -> None:
    results = [*ours((30, 60), "math500"), *ours((10, 5), "aime24")]
    made = report(*results)
    assert [(r.step, r.dataset) for r in made.rows] == [
        (0, "math500"), (0, "aime24"), (10, "math500"), (10, "aime24"),
    ]  # fmt: skip
    assert [(c.dataset, c.best_step) for c in made.comparisons] == [("math500", 10), ("aime24", 0)]
    assert [curve["label"] for curve in made.curves()] == ["a math500", "a aime24"]
    assert [d["name"] for d in made.document()["datasets"]] == ["math500", "aime24"]


def test_curves_need_two_steps() -> None:
    results = [evaluated(checkpoint(run, step), single(1, 1)) for run, step in (("a", 1), ("a", 2), ("b", 1))]
    (curve,) = report(*results, evaluated(checkpoint("hf", None), single(2, 0))).curves()
    assert curve["label"] == "a"
    assert (curve["xs"], curve["ys"]) == ([1, 2], [0.5, 0.5])
    assert curve["los"][0] < 0.5 < curve["his"][0]


def test_what_was_not_judged_is_said_once_a_data_set() -> None:
    base = checkpoint("start", None)
    steps = [evaluated(checkpoint(run, 1), single(1, 1), problem="time out") for run in "ab"]
    said = report(evaluated(base, single(1, 1), problem="time out"), *steps, base=base).verdicts
    assert "gsm8k: 6 of 6 responses got no verdict from a scorer, for which they count as wrong" in said


def test_files(tmp_path: Path) -> None:
    made = report(*(evaluated(checkpoint("a", step), [[True, step > 2]]) for step in (2, 10)))
    made.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.csv", "eval.json", "responses.parquet"]
    document = json.loads((tmp_path / "eval.json").read_text())
    assert document == json.loads(json.dumps(made.document()))
    assert (document["schema_version"], document["wall_s"], document["rollout"]) == (2, 9.5, "bf16")
    assert document["engine"] == {"precision": "bf16"}
    assert document["datasets"] == [{"name": "gsm8k", "file": "/data/gsm8k.parquet", "prompts": 1}]
    assert document["skipped"] == [{"path": "/late", "reason": "torn"}]
    assert [row["pass_at"] for row in document["results"]] == [{"1": 0.5, "2": 1.0}, {"1": 1.0, "2": 1.0}]
    assert [c["against"] for c in document["comparisons"]] == ["first"]
    assert document["verdicts"] == list(made.verdicts)


def test_csv_starts_with_step_and_score(tmp_path: Path) -> None:
    report(*(evaluated(checkpoint("a", step), [[True, step > 2]], flexible=True) for step in (2, 10))).write(tmp_path)
    lines = (tmp_path / "eval.csv").read_bytes().decode().split("\n")
    assert lines[0].startswith("step,score,run,dataset,lo,hi,n,")
    assert lines[0].endswith("pass@1,pass@2")  # and no \r
    rows: list[dict[str, Any]] = list(csv.DictReader(lines))
    assert [(int(row["step"]), float(row["score"])) for row in rows] == [(2, 0.5), (10, 1.0)]
    assert [(row["flexible"], row["boxed"], row["pass@2"]) for row in rows] == [("1.0", "", "1.0")] * 2


def test_responses_are_kept_under_the_run_and_step_that_they_are_shown_as(tmp_path: Path) -> None:
    base = checkpoint("start", None)
    made = report(evaluated(base, single(0, 2)), evaluated(checkpoint("a", 2), single(1, 1)), base=base)
    made.write(tmp_path)
    rows = responses.read(tmp_path / responses.FILE)
    assert [(r["run"], r["step"], r["question"], r["correct"]) for r in rows] == [
        ("a", 0, 1, False), ("a", 0, 2, False), ("a", 2, 1, True), ("a", 2, 2, False),
    ]  # fmt: skip
    assert rows[2] == {
        "run": "a", "step": 2, "dataset": "gsm8k", "question": 1, "sample": 0, "prompt": "gsm8k: 0 + 0?",
        "ground_truth": "0", "response": "I think\u2028it is 0", "prediction": "0", "score": 1.0, "correct": True,
        "flexible": None, "boxed": None, "tokens": 2, "cut": False, "problem": None,
    }  # fmt: skip


SETS = ("gsm8k", "math500", "aime24", "amc23", "olympiad", "minerva", "hellaswag")


def table(*results: Evaluated) -> tuple[list[str], list[list[object]]]:
    return report(*results).table()


def on(datasets: Sequence[str], run: str = "grpo-int8-tis8") -> list[Evaluated]:
    return [evaluated(checkpoint(run, step), single(5, 5), name) for step in (20, 120) for name in datasets]


def drawn(columns: list[str], cells: list[list[object]]) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=300).print(rich_table(columns, cells))
    return [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]


def test_one_data_set() -> None:
    columns, cells = table(evaluated(checkpoint("a", 4), single(1, 0)))
    assert columns == ["run", "step", "accuracy", "95 % interval", "mean length", "cut"]
    assert cells == [["a", 4, "1.000", "0.207 – 1.000", 2.0, "0%"]]


def test_extractors_are_shown_where_they_differ_from_the_scorer() -> None:
    same, without = (evaluated(checkpoint("a", 4), single(1, 0), flexible=flexible) for flexible in (True, None))
    other = evaluated(checkpoint("a", 5), single(0, 1), flexible=True, boxed=False)
    columns, cells = table(same, other)
    assert columns[4:-2] == ["flexible"]
    assert [row[4] for row in cells] == ["1.000", "1.000"]
    assert [row[4] for row in table(without, other)[1]] == [None, "1.000"]
    assert table(same)[0][4:-2] == []
    useless = evaluated(checkpoint("a", 4), single(1, 0), boxed=False)
    assert table(useless)[0][4:-2] == []


def test_several_samples() -> None:
    columns, cells = table(evaluated(checkpoint("a", 4), [[True, False, False]] * 2))
    assert columns[4:-2] == ["pass@3", "maj@3"]
    assert cells[0][4:-2] == ["1.000", "0.000"]


def test_a_wide_table_does_without_the_name_of_its_only_run() -> None:
    wide = [evaluated(checkpoint("grpo-int8-tis8", step), [[True, False]], flexible=True) for step in (1, 2)]
    columns, cells = table(*wide)
    assert columns[0] == "step"
    assert max(map(len, drawn(columns, cells))) <= 80
    assert table(*wide, evaluated(checkpoint("b", 1), [[True, False]], flexible=True))[0][0] == "run"


def test_several_data_sets_stand_beside_each_other() -> None:
    columns, cells = table(*on(SETS[:2]), evaluated(checkpoint("b", 20), single(5, 5), "math500"))
    assert columns == ["run", "step", "gsm8k", "math500"]
    assert cells[0] == ["b", 20, None, "0.500 (0.237–0.763)"]
    assert len(cells) == 3


@pytest.mark.parametrize("run", ["a", "grpo-int8-tis8", "dapo-32b-int8-tis8"])
def test_it_is_at_most_100_wide_in_the_fullest_style_that_fits(run: str) -> None:
    for count in range(1, len(SETS) + 1):
        lines = drawn(*table(*on(SETS[:count], run)))
        assert max(map(len, lines)) <= 100
        assert len(lines) == 4
    cells = [table(*on(SETS[:count]))[1][0][2] for count in (3, 4, 6)]
    assert cells == ["0.500 (0.237–0.763)", "0.500 ±0.263", "0.500"]


def test_several_models_are_ranked_on_each_data_set() -> None:
    """By the newest step of each run, whatever an earlier one reached; base and baseline are compared elsewhere."""
    base, baseline = checkpoint("start", None), checkpoint("theirs", None)
    results = [
        evaluated(checkpoint(run, step), single(right, 100 - right), name)
        for name, rights in (("gsm8k", (90, 40, 70, 65)), ("math", (10, 20, 20, 60)))
        for (run, step), right in zip((("a", 5), ("a", 10), ("b", None), ("c", None)), rights, strict=True)
    ]
    beside = [evaluated(one, single(99, 1), name) for one in (base, baseline) for name in ("gsm8k", "math")]
    made = report(*beside, *results, base=base, baseline=baseline)
    ranked = {board.dataset: [(one.rank, one.model, one.row.accuracy) for one in board.places] for board in made.boards}
    assert ranked == {
        "gsm8k": [(1, "b", 0.7), (2, "c", 0.65), (3, "a step 10", 0.4)],
        "math": [(1, "c", 0.6), (2, "a step 10", 0.2), (3, "b", 0.2)],
    }
    first = made.boards[0]
    assert [one.behind and round(one.behind.value, 9) for one in first.places] == [None, 0.05, 0.3]
    assert [one.behind.p for one in first.places if one.behind] == [mcnemar(5, 0), mcnemar(30, 0)]
    (document, _) = made.document()["leaderboard"]
    assert [(one["model"], one["behind"] and one["behind"]["significant"]) for one in document["places"]] == [
        ("b", None),
        ("c", False),
        ("a step 10", True),
    ]
    assert len([c for c in made.comparisons if c.against == "model"]) == 4


def test_one_model_is_no_ranking() -> None:
    base, baseline = checkpoint("start", None), checkpoint("theirs", None)
    one = evaluated(checkpoint("a", 10), single(4, 6))
    made = report(*(evaluated(other, single(5, 5)) for other in (base, baseline)), one, base=base, baseline=baseline)
    assert made.boards == ()
    assert made.document()["leaderboard"] == []

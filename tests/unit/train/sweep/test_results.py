"""The table of a sweep is what the runs' records and metrics say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import files
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt, RunRecord
from flashrl_cli.train.sweep import HEADINGS, Row, best, row
from flashrl_cli.train.sweep_axes import Point
from flashrl_cli.verl.metrics import NAMES

POINT = Point((("rollout", "int8"), ("algorithm.lr", "1e-4")))


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths("r", tmp_path / "runs/r", tmp_path / "checkpoints/p/r")


def log(run: RunPaths, *rewards: float | None, accuracy: dict[int, float] | None = None) -> None:
    """Write an attempt that logged these rewards from step 1 on."""
    lines = []
    for step, reward in enumerate(rewards, 1):
        values = {"reward": reward, "kl": 0.01 * step, "truncated": 0.02, "step_s": 2.0, "tokens_per_s": 100.0}
        data = {NAMES[name]: value for name, value in values.items()}
        if accuracy and step in accuracy:
            data["val-core/tiny/acc/mean@1"] = accuracy[step]
        lines.append(json.dumps({"step": step, "data": data}))
    files.write_text(run.attempt(1).metrics, "\n".join(lines) + "\n")


def note(run: RunPaths, **fields: Any) -> None:
    given = {"status": "done", "started": "t", "updated": "t", "total_steps": 7, **fields}
    attempts = (Attempt(number=1, **given),)
    whole = RunRecord(name="r", project="p", preset="tiny", created="t", checkpoints="", attempts=attempts)
    store.change(run, lambda _: whole)


def a_row(state: str = "done", *, reward: float | None = None, accuracy: float | None = None) -> Row:
    means = dict.fromkeys(("kl", "truncated", "step_s", "tokens_per_s"), None)
    return Row(
        point=POINT,
        run="r",
        state=state,
        steps=1,
        total=None,
        means={"reward": reward, **means},
        accuracy=accuracy,
        error=None,
        hint=None,
    )


def test_nothing_yet(run: RunPaths) -> None:
    found = row(POINT, run)
    assert (found.state, found.steps, found.total, found.accuracy) == ("waiting", 0, None, None)
    assert set(found.means.values()) == {None}
    assert found.cells(best=False) == ["int8", "1e-4", "r", "waiting", 0, None, None, None, None, None, None, ""]


def test_means_of_the_last_five_steps(run: RunPaths) -> None:
    log(run, 9, 9, 1, 2, 3, 4, 5, accuracy={2: 0.1, 6: 0.5})
    note(run)
    found = row(POINT, run)
    assert (found.state, found.steps, found.total, found.accuracy) == ("done", 7, 7, 0.5)
    assert found.means["reward"] == 3
    assert found.means["kl"] == pytest.approx(0.05)
    assert found.cells(best=True)[2:] == ["r", "done", "7/7", 3, 0.5, pytest.approx(0.05), 2.0, 2.0, 100.0, "★"]


def test_means_of_the_last_tenth_of_a_long_run(run: RunPaths) -> None:
    log(run, *range(1, 101))
    assert row(POINT, run).means["reward"] == 95.5


def test_what_was_not_logged_does_not_count(run: RunPaths) -> None:
    log(run, 1, None, 3)
    assert row(POINT, run).means["reward"] == 2


def test_a_failure_is_told(run: RunPaths) -> None:
    note(run, status="failed", error="out of memory", hint="less")
    document = row(POINT, run).document()
    assert (document["state"], document["error"], document["hint"]) == ("failed", "out of memory", "less")
    assert document["values"] == {"rollout": "int8", "algorithm.lr": 1e-4}
    json.dumps(document)


def test_cells_fit_the_headings() -> None:
    assert len(a_row().cells(best=False)) == len(POINT.values) + len(HEADINGS)


def test_best_by_accuracy() -> None:
    rows = [a_row(accuracy=0.5, reward=9), a_row(accuracy=0.7, reward=1), a_row("failed", accuracy=0.9)]
    assert best(rows) is rows[1]


def test_best_by_reward_where_not_all_were_validated() -> None:
    rows = [a_row(accuracy=0.5, reward=1), a_row(reward=2), a_row("running", reward=3)]
    assert best(rows) is rows[1]


@pytest.mark.parametrize("rows", [[], [a_row(accuracy=1)], [a_row(), a_row()], [a_row(accuracy=1), a_row("failed")]])
def test_nothing_to_compare(rows: list[Row]) -> None:
    assert best(rows) is None

"""Runs on disk, as attempts leave them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from flashrl_cli import files, paths
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt, RunRecord
from flashrl_cli.train.plan import build_plan, plan_document
from flashrl_cli.verl.metrics import NAMES, TIMINGS
from tests.specs import load_spec

Logged = Mapping[str, float | None]


def a_run(name: str = "r") -> RunPaths:
    """A run that has a folder and nothing in it."""
    root = paths.runs_root() / name
    root.mkdir(parents=True)
    return RunPaths(name, root, root)


def training(reward: float | None = 0.5, **more: float | None) -> Logged:
    """What a training step logs: every metric that flashrl names, and `more` of them; underscored phases are `seconds_actor`."""
    named = dict.fromkeys(NAMES, 1.0) | {"reward": reward, "step_s": 10.0}
    seconds = {"generate": 4.0, "actor": 3.0}
    for name, value in more.items():
        if name.startswith("seconds_"):
            seconds[name.removeprefix("seconds_")] = value or 0.0
        else:
            named[name] = value
    return {NAMES[name]: value for name, value in named.items()} | {TIMINGS[p]: s for p, s in seconds.items()}


def validation(accuracy: float | None) -> Logged:
    """What a validation logs."""
    return {"val-core/tiny/acc/mean@1": accuracy}


def log(run: RunPaths, number: int, steps: Mapping[int, Logged]) -> None:
    """Write the metrics of attempt `number`."""
    lines = [json.dumps({"step": step, "data": data}) for step, data in steps.items()]
    files.write_text(run.attempt(number).metrics, "".join(f"{line}\n" for line in lines))


def plan(run: RunPaths, number: int, *sets: str, cap: str | None = "2", **changes: Any) -> dict[str, Any]:
    """Write attempt `number`'s plan of the preset tiny, with top-level `changes` to the document."""
    built = build_plan(
        load_spec("tiny", rollout="int8", tis=cap, sets=sets),
        name=run.name,
        attempt=number,
        python=sys.executable,
        runs_root=paths.runs_root(),
        checkpoints_root=paths.checkpoints_root(),
        data_root=paths.data_root(),
    )
    document = plan_document(built) | changes
    files.write_json(run.attempt(number).plan, document)
    return document


def an_attempt(number: int = 1, **fields: Any) -> Attempt:
    """An attempt that is done, after ten minutes."""
    minute = 20 * number
    given: dict[str, Any] = {
        "status": "done",
        "started": f"2026-01-02T03:{minute:02}:00+00:00",
        "updated": f"2026-01-02T03:{minute + 10:02}:00+00:00",
    }
    return Attempt(number=number, **given | fields)


def write_record(run: RunPaths, attempts: Iterable[Attempt], **fields: Any) -> RunRecord:
    """Write the run's record."""
    given = {"project": "p", "preset": "tiny", "created": "2026-01-02T03:20:00+00:00", "checkpoints": "/c/p/r"}
    whole = RunRecord(name=run.name, attempts=tuple(attempts), **given | fields)
    return store.change(run, lambda _: whole)

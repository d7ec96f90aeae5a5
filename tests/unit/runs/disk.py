"""Runs on disk for tests: with and without records, in the folders that the environment names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from flashrl_cli import files, paths
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt, RunRecord

THEN = "2026-03-01T10:00:00+00:00"
LATER = "2026-03-01T11:30:00+00:00"
GONE: dict[str, Any] = {"pid": 4_000_000, "pid_started": 1.0}
"""A process that does not exist (above Linux's largest pid)."""


def attempt(number: int = 1, **fields: Any) -> Attempt:
    """An attempt of this process, unless `fields` say otherwise."""
    given = {"status": "done", "started": THEN, "updated": LATER, **store.own_process(), **fields}
    return Attempt(number=number, **given)


def place(name: str) -> RunPaths:
    return RunPaths(name, paths.runs_root() / name, paths.checkpoints_root() / "tiny" / name)


def make(name: str, *attempts: Attempt, checkpoints: int = 0) -> RunPaths:
    """Run `name` with a record of `attempts` (none without), their folders, and a checkpoint of so many bytes."""
    run = place(name)
    for number in [one.number for one in attempts] or [1]:
        run.attempt(number).root.mkdir(parents=True)
    if attempts:
        store.change(run, lambda _: a_record(run, *attempts))
    if checkpoints:
        file = run.checkpoints / "global_step_1" / "actor" / "model.pt"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x" * checkpoints)
    return run


def a_record(run: RunPaths, *attempts: Attempt) -> RunRecord:
    return RunRecord(
        name=run.name,
        project="tiny",
        preset="demo",
        created=THEN,
        checkpoints=str(run.checkpoints),
        attempts=attempts,
    )


def log(run: RunPaths, number: int, *lines: Mapping[str, float | None], first: int = 1) -> None:
    """Append steps to the metrics of attempt `number`."""
    with run.attempt(number).metrics.open("a") as stream:
        for step, data in enumerate(lines, first):
            stream.write(json.dumps({"step": step, "data": data}) + "\n")


def planned(run: RunPaths, number: int, **spec: Any) -> None:
    """The plan of attempt `number`, with these parts of the preset."""
    plan = {
        "schema_version": 1,
        "preset": "older",
        "overrides": [],
        "env": {},
        "files": {"checkpoints": str(run.checkpoints)},
        "spec": spec,
    }
    files.write_json(run.attempt(number).plan, plan)


def touch(run: RunPaths, moment: float) -> None:
    """Date everything in the run's folder."""
    for place_ in (*run.root.rglob("*"), run.root):
        os.utime(place_, (moment, moment))

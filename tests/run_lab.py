"""A recorded run with checkpoints, metrics and evaluations, as flashrl and verl leave them."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import paths
from flashrl_cli.runs import store
from flashrl_cli.runs.saved import point_tracker
from flashrl_cli.runs.store import Attempt, RunRecord
from tests.saved_files import saved_step


@dataclasses.dataclass(frozen=True)
class Lab:
    """One run and what can happen to it."""

    run: paths.RunPaths

    def save(self, *steps: int, **how: Any) -> None:
        for step in steps:
            saved_step(self.run.checkpoints, step, **how)
        point_tracker(self.run.checkpoints, max(steps))

    def recorded(self, **attempt: Any) -> RunRecord:
        given = {"status": "done", "started": store.now(), "updated": store.now(), **attempt}
        whole = RunRecord(
            name=self.run.name,
            project="p",
            preset="tiny",
            created=store.now(),
            checkpoints=str(self.run.checkpoints),
            attempts=(Attempt(number=1, **given),),
        )
        return store.change(self.run, lambda _: whole)

    def log(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        file = self.run.attempt(1).metrics
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in steps.items()))

    def plan(self, *overrides: str, advantage: str = "grpo", argv: tuple[str, ...] = ()) -> None:
        spec = {"algorithm": {"advantage": advantage}}
        file = self.run.attempt(1).plan
        file.parent.mkdir(parents=True, exist_ok=True)
        plan = {"schema_version": 1, "overrides": overrides, "env": {}, "files": {}, "spec": spec, "argv": argv}
        file.write_text(json.dumps(plan))

    def evaluate(self, accuracy: Mapping[int, float], *, folder: Path | None = None, age: float = -5) -> Path:
        """An evaluation of some steps, `age` seconds old: by default newer than every file."""
        file = (folder or self.run.checkpoints) / "eval" / "eval.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        base = {"run": "r", "step": 0, "accuracy": 0.99, "path": "/base"}
        rows = [
            {"run": "r", "step": step, "accuracy": value, "path": str(self.hf(step))}
            for step, value in accuracy.items()
        ]
        file.write_text(json.dumps({"schema_version": 1, "results": [base, *rows]}))
        when = time.time() - age
        os.utime(file, (when, when))
        return file

    def hf(self, step: int) -> Path:
        return self.run.checkpoints / f"global_step_{step}" / "actor" / "huggingface"

    def names(self) -> list[str]:
        return sorted(path.name for path in self.run.checkpoints.iterdir())


@pytest.fixture
def lab() -> Lab:
    return Lab(paths.RunPaths("r", paths.runs_root() / "r", paths.checkpoints_root() / "p" / "r"))

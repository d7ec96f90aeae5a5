"""What tests of training share: plans, handshakes, a display that records, a clock, a Ray job server in memory."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flashrl_cli.config.resolve import Resolved
from flashrl_cli.contract import Handshake
from flashrl_cli.train.plan import LaunchPlan, build_plan
from flashrl_cli.verl.metrics import StepMetrics
from tests.specs import load_spec


def plan_of(
    resolved: Resolved, root: Path = Path("/w"), *, name: str = "r", attempt: int = 1, python: str = sys.executable
) -> LaunchPlan:
    """Plan of a run whose folders are below `root`."""
    return build_plan(
        resolved,
        name=name,
        attempt=attempt,
        python=python,
        runs_root=root / "runs",
        checkpoints_root=root / "checkpoints",
        data_root=root / "data",
    )


def planned(preset: str = "tiny", *sets: str, root: Path = Path("/w"), **options: str | None) -> LaunchPlan:
    """Plan of a preset under `--set` texts and other options."""
    return plan_of(load_spec(preset, sets=sets, **options), root)


def handshake(**changes: Any) -> Handshake:
    """Handshake of an INT8 worker."""
    whole: dict[str, Any] = {
        "host": "node-1", "pid": 1, "precision": "int8", "quantized_layers": 14, "linear_layers": 15,
        "quantized_bytes": 9, "kernel": "K", "vllm": "0", "torch": "2", "device": "cpu", "refits": 1, "refit_s": 0.1,
        "rotation": 64,
    }  # fmt: skip
    return Handshake(**whole | changes)


class Recorder:
    """A display that keeps what it is given."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.proofs: list[list[Handshake]] = []
        self.steps: list[int] = []
        self.warnings: list[str] = []
        self.total: int | None = None
        self.ticks = 0

    def expect(self, total: int) -> None:
        self.total = total

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def proven(self, handshakes: list[Handshake]) -> None:
        self.proofs.append(handshakes)

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics.step)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def tick(self) -> None:
        self.ticks += 1


class Clock:
    """Time that passes only when the code under test sleeps, or the test moves `now`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._later: list[tuple[float, Callable[[], object]]] = []

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        self._later.append((self.now + seconds, act))

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due, act in self._later:
            if due <= self.now:
                act()


class FakeJobs:
    """`ray_job.Jobs` whose answers can be made to fail; `log` has the logs, `run` makes a submitted job's state."""

    def __init__(self, run: Callable[[str], tuple[str, str]] | None = None) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.log: dict[str, str] = {}
        self.failing: Exception | None = None
        self.breaks = 0
        """How many connections for the log break after their first piece."""
        self.asked = 0
        self.opened = 0
        self.stopped: list[str] = []
        self.ends_when_stopped = True
        self.hangs = threading.Event()
        self.rows: dict[str, list[dict[str, Any]]] = {"nodes": [], "actors": []}
        """What Ray's state API lists."""
        self._run = run

    def add(self, name: str, status: str = "RUNNING", **metadata: str) -> SimpleNamespace:
        job = SimpleNamespace(
            submission_id=name, status=status, message="", driver_exit_code=None, metadata=metadata, job_id="0a000000"
        )
        self.jobs[name] = job
        self.log.setdefault(name, "")
        return job

    def submit_job(self, **job: Any) -> str:
        self._answer()
        name = str(job.get("submission_id") or f"raysubmit_{len(self.jobs)}")
        if name in self.jobs:
            raise RuntimeError(f"Job with submission_id {name} already exists")
        added = self.add(name, **job.get("metadata") or {})
        added.submitted = job
        if self._run:
            added.status, self.log[name] = self._run(job["entrypoint"])
        return name

    def get_job_info(self, job_id: str) -> Any:
        self.asked += 1
        self._answer()
        return self.jobs[job_id]

    def get_job_logs(self, job_id: str) -> str:
        self._answer()
        return self.log[job_id]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.opened += 1
        sent = 0
        while True:
            over = self.jobs[job_id].status not in {"RUNNING", "PENDING"}
            text = self.log[job_id][sent:]
            for start in range(0, len(text), 7):
                yield text[start : start + 7]
                if self.breaks:
                    self.breaks -= 1
                    raise RuntimeError("WebSocket connection closed unexpectedly")
            sent += len(text)
            if over and not self.hangs.is_set() and sent == len(self.log[job_id]):
                return
            await asyncio.sleep(0.005)

    def stop_job(self, job_id: str) -> bool:
        self._answer()
        self.stopped.append(job_id)
        if self.ends_when_stopped:
            self.jobs[job_id].status = "STOPPED"
        return True

    def list_jobs(self) -> list[Any]:
        self._answer()
        return list(self.jobs.values())

    def listed(self, what: str, **filters: str) -> list[dict[str, Any]]:
        self._answer()
        return [row for row in self.rows[what] if filters.items() <= row.items()]

    def _answer(self) -> None:
        if self.failing:
            raise self.failing

"""A Ray job server in memory, for tests: its clock is the test's, and every answer can be made to fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any


class FakeJobs:
    """`ray.client.Jobs`. A job's log is what `log` holds; `run` makes a submitted job's state."""

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

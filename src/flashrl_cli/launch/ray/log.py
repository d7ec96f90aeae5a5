"""The log of a Ray job, followed into a file here as it grows."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from flashrl_cli.launch.ray.client import Jobs

SILENCE_S = 300.0
"""A connection that brought nothing for so long is made anew: it may be dead without either side knowing."""
PAUSES_S = (5.0, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Before the next connection: after a stream that ended, after the first failure, the second …"""


class Follower(threading.Thread):
    """Appends a job's log to a file until the job has ended. Ray streams it from its start: what is here already is passed over."""

    def __init__(self, jobs: Jobs, job_id: str, file: Path) -> None:
        super().__init__(name=f"log of {job_id}", daemon=True)
        self._jobs, self._id, self._file = jobs, job_id, file
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._taken = 0
        """Characters written so far."""

    def run(self) -> None:
        """Follow, over as many connections as it takes."""
        failures = 0
        while not self._ended.is_set():
            before = self._taken
            try:
                asyncio.run(self._follow())
                failures = 0  # Ray closes the stream when the job has ended, and when its agent is replaced
            except Exception:  # noqa: BLE001 - aiohttp and Ray raise many; the job's state is asked for elsewhere
                failures = 1 if self._taken > before else failures + 1
            self._ended.wait(PAUSES_S[min(failures, len(PAUSES_S) - 1)])

    def finish(self, patience_s: float) -> None:
        """Called once the job has ended: wait for the rest of the stream, and fetch what it does not bring."""
        self._ended.set()
        self.join(patience_s)
        if self.is_alive():
            with contextlib.suppress(Exception):
                self._take(self._jobs.get_job_logs(self._id), start=0)

    async def _follow(self) -> None:
        position = 0
        stream = cast("AsyncGenerator[str]", self._jobs.tail_job_logs(self._id))
        async with contextlib.aclosing(stream) as chunks:
            while True:
                chunk = await asyncio.wait_for(anext(chunks, None), SILENCE_S)
                if chunk is None:
                    return
                self._take(chunk, start=position)
                position += len(chunk)

    def _take(self, text: str, *, start: int) -> None:
        """Append what of `text`, which begins at character `start` of the log, is new."""
        with self._lock:
            new = text[max(self._taken - start, 0) :]
            if new:
                with self._file.open("a", encoding="utf-8", newline="") as stream:
                    stream.write(new)
                self._taken += len(new)

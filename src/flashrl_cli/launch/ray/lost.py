"""Notices when a Ray cluster loses a node on which a job has actors: verl and vLLM may wait for ever for those."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli.runs.tail import last_lines

if TYPE_CHECKING:
    from pathlib import Path

    from flashrl_cli.launch.ray.client import Jobs

PAUSE_S = 5.0
LATE_S = 45.0
"""Ray declares a node dead after five lost health checks, 3 s apart and more; the job itself may fail at once."""
SIGNS = re.compile(
    r"ActorDiedError|ActorUnavailableError|NodeDiedError|WorkerCrashedError|Connection (reset|closed|refused)|Broken pipe"
    r"|NCCL|[Gg]loo|died|unreachable|RpcError"
)
"""What a log shows where a failure may come from a lost node."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A node that is gone: its address, and what Ray says of it."""

    address: str
    reason: str


class NodeWatch:
    """Asks for the cluster's nodes now and then."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._alive: set[str] = set()
        self._due = 0.0

    def lost(self, job_id: str | None) -> Lost | None:
        """The node that died since the first call and held actors of Ray's job `job_id`; None if none, or nobody answers."""
        now = time.monotonic()
        if job_id is None or now < self._due:
            return None
        self._due = now + PAUSE_S
        try:
            return self._look(job_id)
        except (RuntimeError, OSError, KeyError, ValueError):
            return None  # whether the job server answers at all is watched elsewhere

    def lost_in_the_end(self, job_id: str | None, log: Path) -> Lost | None:
        """The lost node that made a job fail, waited for where the log shows that something broke off."""
        suspect = len(self._alive) > 1 and SIGNS.search("\n".join(last_lines(log, 300)))
        deadline = time.monotonic() + (LATE_S if suspect else 0.0)
        while True:
            self._due = 0.0
            found = self.lost(job_id)
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(1.0)

    def _look(self, job_id: str) -> Lost | None:
        for node in self._jobs.listed("nodes"):
            name = node["node_id"]
            if node["state"] == "ALIVE":
                self._alive.add(name)
            elif name in self._alive and self._jobs.listed("actors", job_id=job_id, node_id=name):
                return Lost(node["node_ip"], node.get("state_message") or "no reason given")
        return None

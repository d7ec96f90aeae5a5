"""Where a run is executed: on this machine, or as a job of a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import InputError
from flashrl_cli.runs import store
from flashrl_cli.text import counted
from flashrl_cli.train import plan as ray_plan
from flashrl_cli.train import preflight
from flashrl_cli.verl import environment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.train.executors.ray_job import RayJob
    from flashrl_cli.train.plan import LaunchPlan
    from flashrl_cli.train.process import Start

NAMES = ("local", "ray")


@dataclass(frozen=True, slots=True)
class Place:
    """This machine, or the Ray cluster whose job server is at `address`."""

    address: str | None = None

    def fit(self, resolved: Resolved) -> Resolved:
        """The preset as it is executed there."""
        return environment.on_cluster(resolved) if self.address else resolved

    def job(self, plan: LaunchPlan) -> ray_plan.Job | None:
        """What a cluster would be given; None on this machine."""
        return ray_plan.job_request(plan, self.address) if self.address else None

    def document(self, plan: LaunchPlan) -> dict[str, Any]:
        """What `--dry-run --json` adds to the plan."""
        job = self.job(plan)
        return {"ray": {"address": job.address, **ray_plan.submission(job)}} if job else {}

    def gpu_memory(self, plan: LaunchPlan) -> list[int]:
        """Bytes of each GPU, as far as they can be seen from here."""
        return [] if self.address else preflight.gpu_memory(plan.spec)

    def ready(self, plan: LaunchPlan, data_root: Path, say: Callable[[str], None]) -> Start:
        """Check that `plan` can run there, and return how it is started.

        Raises EnvironmentNotReady, or InputError for bad rows.
        """
        if self.address is None:
            from flashrl_cli.train.supervise import locally

            preflight.check(plan, data_root)
            return locally
        from flashrl_cli.train.executors import ray_job, ray_ready
        from flashrl_cli.train.executors import ray_job as ray_client

        preflight.check_rows(plan, data_root)
        say(f"asking every node of the Ray cluster at {self.address} …")
        jobs = ray_client.connect(self.address)
        found = ray_ready.check(plan, data_root, jobs, self.address)
        say(
            f"{counted(found.nodes, 'node')}; metrics and proof come {'as files' if found.shared else 'from the job log'}"
        )
        return _recorded(ray_job.starter(jobs, self.address, shared=found.shared), self.address)


def chosen(name: str, address: str | None) -> Place:
    """The place that `--executor` and `--ray-address` name. Raises InputError."""
    if name not in NAMES:
        raise InputError(f"--executor {name}: there is no such executor", hint=f"--executor {'|'.join(NAMES)}")
    if name == "ray":
        return Place(address or os.environ.get("RAY_ADDRESS") or ray_plan.DEFAULT_ADDRESS)
    if address is not None:
        raise InputError("--ray-address without --executor ray", hint=f"--executor ray --ray-address {address}")
    return Place()


def _recorded(start: Callable[[LaunchPlan], RayJob], address: str) -> Start:
    """Start, and have the run's record say as which job."""

    def begin(plan: LaunchPlan) -> RayJob:
        job = start(plan)
        store.renew(plan.paths, plan.attempt, executor="ray", ray_address=address, job_id=job.id)
        return job

    return begin

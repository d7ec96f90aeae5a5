"""Where a run is executed: as a process on this machine, or as a job of a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import InputError
from flashrl_cli.runs import store
from flashrl_cli.text import counted
from flashrl_cli.train import preflight
from flashrl_cli.train.process import Tree
from flashrl_cli.verl import environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.train.plan import LaunchPlan
    from flashrl_cli.train.process import Handle, Start

NAMES = ("local", "ray")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"


@dataclass(frozen=True, slots=True)
class Place:
    """Where runs are executed: on this machine, or on the Ray cluster whose job server is at `address`."""

    address: str | None = None

    def fit(self, resolved: Resolved) -> Resolved:
        """The preset as it is executed there."""
        if self.address is None:
            return resolved
        return preflight.with_attention(environment.on_cluster(resolved), here=False)

    def document(self, plan: LaunchPlan) -> dict[str, Any]:
        """What `--dry-run --json` adds to the plan: the job that would be submitted to a cluster."""
        if self.address is None:
            return {}
        from flashrl_cli.train.executors import ray_job

        job = ray_job.job_request(plan, self.address)
        return {"ray": {"address": job.address, **ray_job.submission(job)}}

    def submission_script(self, plan: LaunchPlan) -> list[str]:
        """The end of the script that `--dry-run` prints, if it submits a job to a cluster."""
        if self.address is None:
            return []
        from flashrl_cli.train.executors import ray_job

        return ray_job.submission_script(plan, ray_job.job_request(plan, self.address))

    def gpu_memory(self, spec: RunSpec) -> list[int]:
        """Bytes of each GPU of a run of `spec`, if they can be seen from here."""
        return [] if self.address else preflight.gpu_memory(spec)

    def ready(self, plan: LaunchPlan, say: Callable[[str], None]) -> Start:
        """Check that `plan` can run there, and return the function that starts it.

        Raises EnvironmentNotReady, or InputError for invalid data rows.
        """
        if self.address is None:
            preflight.check(plan)
            return start_here
        from flashrl_cli.train.executors import ray_job, ray_ready

        address = self.address
        preflight.check_rows(plan)
        say(f"asking every node of the Ray cluster at {address} …")
        jobs = ray_job.connect(address)
        found = ray_ready.check(plan, jobs, address)
        source = "as files" if found.shared else "from the job log"
        say(f"{counted(found.nodes, 'node')}; metrics and proof come {source}")

        def start(plan: LaunchPlan) -> Handle:
            job = ray_job.submit(jobs, plan, address, shared=found.shared)
            store.renew(plan.paths, plan.attempt, executor="ray", ray_address=address, job_id=job.id)
            return job

        return start


def chosen(name: str, address: str | None) -> Place:
    """The place that `--executor` and `--ray-address` name. Raises InputError."""
    if name not in NAMES:
        raise InputError(f"--executor {name}: there is no such executor", hint=f"--executor {'|'.join(NAMES)}")
    if name == "ray":
        return Place(address or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS)
    if address is not None:
        raise InputError("--ray-address without --executor ray", hint=f"--executor ray --ray-address {address}")
    return Place()


def start_here(plan: LaunchPlan) -> Handle:
    """Start `plan` as a process on this machine."""
    return Tree(plan.argv, env={**os.environ, **plan.env}, cwd=plan.cwd, log=plan.attempt_paths.log)

"""Where a run is executed: on this machine, or as a job of a Ray cluster. What the command line says, for `train`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli.errors import InputError
from flashrl_cli.launch import preflight, ray_plan
from flashrl_cli.verl import cluster

if TYPE_CHECKING:
    from pathlib import Path

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.launch.executor import Start
    from flashrl_cli.launch.plan import LaunchPlan

NAMES = ("local", "ray")


@dataclass(frozen=True, slots=True)
class Executor:
    """An executor; the job server's address is a Ray cluster's and None for this machine."""

    address: str | None = None

    def fit(self, resolved: Resolved) -> Resolved:
        """The preset as it is executed there."""
        return cluster.on_cluster(resolved) if self.address else resolved

    def job(self, plan: LaunchPlan) -> ray_plan.Job | None:
        """What a cluster would be given, None on this machine."""
        return ray_plan.job(plan, self.address) if self.address else None

    def ready(self, plan: LaunchPlan, data_root: Path) -> Start | None:
        """Check that `plan` can run there, and tell how it is started (None: as ever). Raises EnvironmentNotReady."""
        if self.address is None:
            preflight.check(plan, data_root)
            return None
        from flashrl_cli.launch import ray_client, ray_job, ray_ready

        jobs = ray_client.connect(self.address)
        found = ray_ready.check(plan, data_root, jobs, self.address)
        return ray_job.starter(jobs, self.address, shared=found.shared)


def chosen(name: str, address: str | None) -> Executor:
    """The executor of `--executor` and `--ray-address`. Raises InputError."""
    if name not in NAMES:
        raise InputError(f"--executor {name}: there is {' and '.join(NAMES)}", hint=f"--executor {'|'.join(NAMES)}")
    if name == "local":
        if address is not None:
            raise InputError("--ray-address without --executor ray", hint="add `--executor ray`")
        return Executor()
    return Executor(address or os.environ.get("RAY_ADDRESS") or ray_plan.DEFAULT_ADDRESS)

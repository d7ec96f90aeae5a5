"""A launch plan under way as a Ray job: submitted, followed and ended through Ray's job server."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import EnvironmentNotReady, RunFailed
from flashrl_cli.launch.ray import plan as ray_plan
from flashrl_cli.launch.ray.log import Follower
from flashrl_cli.launch.ray.lost import Lost, NodeWatch
from flashrl_cli.launch.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable

    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.launch.ray.client import Jobs

PAUSES_S = (1.5, 3.0, 6.0, 12.0, 20.0)
"""Between two questions for the job's state: the first while it answers, the others after each failure to."""
PATIENCE_S = 120.0
"""How long the job server may stay silent."""
LOG_PATIENCE_S = 15.0
STOP_PATIENCE_S = 60.0
"""How long a job may take to stop: Ray itself kills its driver after 3 s."""
ENDED = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": -signal.SIGTERM}


class RayJob:
    """An `executor.Handle`. Where the attempt's folder is not shared, metrics and handshakes come out of the log."""

    def __init__(self, jobs: Jobs, plan: LaunchPlan, job_id: str, *, shared: bool) -> None:
        self.id = job_id
        self._jobs, self._log = jobs, plan.attempt_paths.log
        self._relay = None if shared else Relay(plan.attempt_paths)
        self._follower = Follower(jobs, job_id, self._log)
        self._follower.start()
        self._nodes = NodeWatch(jobs)
        self._ray_id: str | None = None
        self._lost = False
        self._code: int | None = None
        self._answered = time.monotonic()
        self._due = 0.0
        self._failures = 0

    def poll(self) -> int | None:
        """Exit code, None while the job runs.

        Raises RunFailed when the job server is silent for two minutes, and, once, when a lost node made the job fail.
        """
        if self._code is None and time.monotonic() >= self._due:
            self._ask()
        return self._code

    def tend(self) -> None:
        """Take metrics and handshakes out of what the log brought. Raises RunFailed, once, when a node of the job is lost."""
        if self._relay:
            self._relay.poll()
        if self._code is None and not self._lost:
            self._tell(self._nodes.lost(self._ray_id))

    def terminate(self) -> None:
        """Ask Ray to stop the job; a server that does not answer is asked again by `kill`."""
        try:
            self._jobs.stop_job(self.id)
        except (RuntimeError, OSError):
            return
        self._due = 0.0

    def kill(self, *, grace_s: float = 0.0) -> None:
        """Stop the job and wait until it has ended. Raises RunFailed if it does not, or nobody answers."""
        deadline = time.monotonic() + max(grace_s, STOP_PATIENCE_S)
        while self.poll() is None:
            self.terminate()
            if time.monotonic() > deadline:
                raise RunFailed(f"Ray job {self.id} does not end", hint=f"ray job stop {self.id}")
            time.sleep(0.5)

    def _ask(self) -> None:
        try:
            info = self._jobs.get_job_info(self.id)
        except (RuntimeError, OSError) as error:
            self._failed(error)
            return
        self._answered, self._failures = time.monotonic(), 0
        self._due = self._answered + PAUSES_S[0]
        self._ray_id = info.job_id or self._ray_id
        state = str(getattr(info.status, "value", info.status))
        if state in ENDED:
            self._end(state, info)

    def _failed(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._answered > PATIENCE_S:
            raise RunFailed(
                f"Ray's job server has not answered for {now - self._answered:.0f} s: {str(error)[:300]}",
                hint=f"job {self.id} may still run: `ray job status {self.id}`; go on with --resume auto",
            ) from error
        self._failures = min(self._failures + 1, len(PAUSES_S) - 1)
        self._due = now + PAUSES_S[self._failures]

    def _end(self, state: str, info: Any) -> None:
        self._follower.finish(LOG_PATIENCE_S)
        code = info.driver_exit_code
        if state == "FAILED" and code is None:
            # there was no driver to say why: its environment failed, or its node was lost
            with self._log.open("a", encoding="utf-8") as stream:
                stream.write(f"\nRay: {info.message}\n")
        if self._relay:
            self._relay.poll(ended=True)
        self._code = code or ENDED[state]
        if state == "FAILED" and not self._lost:
            self._tell(self._nodes.lost_in_the_end(self._ray_id, self._log))

    def _tell(self, lost: Lost | None) -> None:
        if lost is None:
            return
        self._lost = True
        raise RunFailed(
            f"the Ray cluster lost node {lost.address}, on which workers of the run were: {lost.reason[:300]}",
            hint="`--resume auto` goes on from the newest checkpoint, once the cluster has nodes enough again",
        )


def starter(jobs: Jobs, address: str, *, shared: bool) -> Callable[[LaunchPlan], RayJob]:
    """How a plan is started as a job of `jobs`."""

    def start(plan: LaunchPlan) -> RayJob:
        job = ray_plan.job(plan, address, shared=shared)
        try:
            job_id = _submit(jobs, job)
        except (RuntimeError, OSError, ValueError) as error:
            raise EnvironmentNotReady(
                f"Ray does not take the job: {str(error)[:1000]}", hint="`--dry-run` shows what is submitted"
            ) from error
        return RayJob(jobs, plan, job_id, shared=shared)

    return start


def _submit(jobs: Jobs, job: ray_plan.Job) -> str:
    """Submit under the job's name, or the first free one after it: a cluster remembers the names of runs that were removed."""
    used = {known.submission_id for known in jobs.list_jobs()}
    names = (job.submission_id, *(f"{job.submission_id}-{n}" for n in range(2, len(used) + 2)))
    free = next(name for name in names if name not in used)
    return jobs.submit_job(**ray_plan.submission(job) | {"submission_id": free})

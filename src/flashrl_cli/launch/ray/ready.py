"""Can a Ray cluster run a plan? Each of its nodes is asked, by a small job, before the run is submitted."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.doctor import gpus
from flashrl_cli.doctor.plugins import ENTRY_POINTS
from flashrl_cli.doctor.stacks import DISTRIBUTIONS
from flashrl_cli.errors import EnvironmentNotReady, Problem
from flashrl_cli.launch.inputs import local_inputs
from flashrl_cli.launch.ray.judge import Cluster, problems
from flashrl_cli.launch.ray.nodes import MARK

if TYPE_CHECKING:
    from pathlib import Path

    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.launch.ray.client import Jobs

MODULE = "flashrl_cli.launch.ray.nodes"
COMPARED = ("flashrl-cli", "ray", *DISTRIBUTIONS)
PATIENCE_S = 180.0
"""For Ray to start the job and for every node to start a worker and answer."""
POLL_S = 1.0
OVER = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass(frozen=True, slots=True)
class Readiness:
    """A cluster that can run a plan; `shared` tells that the runs folder is the same here and on all its `nodes`."""

    shared: bool
    nodes: int


def check(plan: LaunchPlan, data_root: Path, jobs: Jobs, address: str) -> Readiness:
    """Ask every node. Raises EnvironmentNotReady with all that keeps the cluster from running `plan`."""
    secret = uuid.uuid4().hex
    token = plan.paths.root.parent / f".flashrl-{secret}"
    with _written(token, secret):
        text = _output(jobs, _command(plan, _request(plan, data_root, token, secret)), address)
    cluster = _cluster(text, secret, address)
    found = [*_left(jobs, plan), *problems(plan, cluster, _versions_here())]
    if found:
        raise EnvironmentNotReady(
            f"the Ray cluster at {address} cannot run {plan.preset}",
            problems=found,
            hint="`--dry-run` prints the job without submitting it",
        )
    return Readiness(cluster.shared, len(cluster.nodes))


def _request(plan: LaunchPlan, data_root: Path, token: Path, secret: str) -> dict[str, Any]:
    checkpoints = plan.paths.checkpoints.parent / f".flashrl-{secret}"
    on_gpus = plan.spec.resources.platform != "cpu"
    return {
        "secret": secret,
        "distributions": COMPARED,
        "paths": {f"{key} ({path})": str(path) for key, path in local_inputs(plan.spec, data_root).items()},
        "tokens": {"runs": str(token), "checkpoints": str(checkpoints)},
        "made": {"checkpoints": str(checkpoints)},
        "plugins": list(ENTRY_POINTS),
        "variables": list(gpus.AMD),
        "gpu_query": ["nvidia-smi", *gpus.QUERY] if on_gpus else [],
    }


def _command(plan: LaunchPlan, request: dict[str, Any]) -> str:
    return f"exec {shlex.join([plan.argv[0], '-m', MODULE, json.dumps(request)])}"


@contextlib.contextmanager
def _written(token: Path, text: str) -> Iterator[None]:
    files.write_text(token, text)
    try:
        yield
    finally:
        token.unlink(missing_ok=True)


def _output(jobs: Jobs, command: str, address: str) -> str:
    """Log of a small job, once it has ended. Raises EnvironmentNotReady if it does not."""
    try:
        job_id = jobs.submit_job(entrypoint=command, metadata={"flashrl": "nodes"})
        deadline = time.monotonic() + PATIENCE_S
        while str(getattr(state := jobs.get_job_info(job_id).status, "value", state)) not in OVER:
            if time.monotonic() > deadline:
                jobs.stop_job(job_id)
                raise EnvironmentNotReady(
                    f"the Ray cluster at {address} does not start a small job within {PATIENCE_S:g} s",
                    hint=f"`ray job logs {job_id} --address {address}`; are all its nodes alive?",
                )
            time.sleep(POLL_S)
        return jobs.get_job_logs(job_id) or str(jobs.get_job_info(job_id).message)
    except (RuntimeError, OSError, ValueError) as error:
        raise EnvironmentNotReady(
            f"the Ray job server at {address} fails: {str(error)[:1000]}", hint="look at the cluster's dashboard"
        ) from error


def _cluster(text: str, secret: str, address: str) -> Cluster:
    """What the job told. Raises EnvironmentNotReady with the end of its log if it told nothing."""
    for line in text.splitlines():
        _, mark, answer = line.partition(MARK)
        if mark and answer.startswith("{"):
            return Cluster(**json.loads(answer), secret=secret)
    tail = [line for line in text.splitlines() if line.strip()][-5:]
    raise EnvironmentNotReady(
        "\n".join(
            [
                f"flashrl does not run on the head node of the Ray cluster at {address}",
                *(f"  | {t[:300]}" for t in tail),
            ]
        ),
        hint="install the same environment at the same path on every node, or submit from a node of the cluster",
    )


def _left(jobs: Jobs, plan: LaunchPlan) -> Iterator[Problem]:
    """An earlier attempt that still runs there would write the same checkpoints."""
    for job in jobs.list_jobs():
        told = job.metadata or {}
        over = str(getattr(job.status, "value", job.status)) in OVER
        if not over and told.get("flashrl_folder") == str(plan.paths.root):
            yield Problem(
                f"attempt {told.get('flashrl_attempt')} of run {plan.name} still runs there",
                where=job.submission_id,
                hint=f"ray job stop {job.submission_id}",
            )


def _versions_here() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found

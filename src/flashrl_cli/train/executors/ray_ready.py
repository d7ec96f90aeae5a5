"""Check whether a Ray cluster can run a plan: a small job examines each node before the run is submitted.

The job and its answer come first, then the pure functions that compare the answers with a plan.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.errors import EnvironmentNotReady, Problem
from flashrl_cli.machine import finding, gpus, software
from flashrl_cli.machine.software import DISTRIBUTIONS, ENTRY_POINTS
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.text import counted
from flashrl_cli.train.executors.ray_nodes import MARK
from flashrl_cli.train.preflight import local_inputs
from flashrl_cli.verl.config import engine_devices
from flashrl_cli.verl.environment import CPUS_A_DEVICE, CPUS_A_ROLLOUT_DEVICE, worker_variables

if TYPE_CHECKING:
    from pathlib import Path

    from flashrl_cli.train.executors.ray_job import Jobs
    from flashrl_cli.train.plan import LaunchPlan


MODULE = "flashrl_cli.train.executors.ray_nodes"
COMPARED = ("flashrl-cli", "ray", *DISTRIBUTIONS)
PATIENCE_S = 180.0
"""Seconds for Ray to start the job and for every node to start a worker and answer."""
CPUS_OF_ANY_NODE = 10_000
"""More CPUs than a run asks of a node: how many there are in all is not known, only how many are free."""
POLL_S = 1.0
OVER = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass(frozen=True, slots=True)
class Readiness:
    """A cluster that can run a plan; `shared` says that the runs folder is the same here and on all its `nodes`."""

    shared: bool
    nodes: int


def check(plan: LaunchPlan, jobs: Jobs, address: str) -> Readiness:
    """Examine every node. Raises EnvironmentNotReady with every reason why the cluster cannot run `plan`."""
    secret = uuid.uuid4().hex
    token = plan.paths.root.parent / f".flashrl-{secret}"
    with _written(token, secret):
        request = json.dumps(_request(plan, token, secret))
        text = _output(jobs, f"exec {shlex.join([plan.argv[0], '-m', MODULE, request])}", address)
    cluster = _cluster(text, secret, address)
    found = [*_left(jobs, plan), *problems(plan, cluster, _versions_here())]
    if found:
        raise EnvironmentNotReady(
            f"the Ray cluster at {address} cannot run {plan.preset}",
            problems=found,
            hint="`--dry-run` prints the job without submitting it",
        )
    return Readiness(cluster.shared, len(cluster.nodes))


def _request(plan: LaunchPlan, token: Path, secret: str) -> dict[str, Any]:
    checkpoints = plan.paths.checkpoints.parent / f".flashrl-{secret}"
    on_gpus = plan.spec.resources.platform != "cpu"
    return {
        "secret": secret,
        "distributions": COMPARED,
        "paths": {f"{key} ({path})": str(path) for key, path in local_inputs(plan.spec).items()},
        "tokens": {"runs": str(token), "checkpoints": str(checkpoints)},
        "made": {"checkpoints": str(checkpoints)},
        "plugins": list(ENTRY_POINTS),
        "variables": list(gpus.AMD),
        "gpu_query": ["nvidia-smi", *gpus.QUERY] if on_gpus else [],
    }


@contextlib.contextmanager
def _written(token: Path, text: str) -> Iterator[None]:
    files.write_text(token, text)
    try:
        yield
    finally:
        token.unlink(missing_ok=True)


def _output(jobs: Jobs, command: str, address: str) -> str:
    """Log of a small job, once it has ended. Raises EnvironmentNotReady if it does not end."""
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
    """The answer in the job's log. Raises EnvironmentNotReady with the log's end if there is no answer."""
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
    """Yield earlier attempts that still run on the cluster: they would write the same checkpoints."""
    for job in jobs.list_jobs():
        metadata = job.metadata or {}
        over = str(getattr(job.status, "value", job.status)) in OVER
        if not over and metadata.get("flashrl_folder") == str(plan.paths.root):
            yield Problem(
                f"attempt {metadata.get('flashrl_attempt')} of run {plan.name} still runs there",
                where=job.submission_id,
                hint=f"ray job stop {job.submission_id}",
            )


def _versions_here() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The answer of `ray_nodes`: each live node, the files that the head could not create, the text of the tokens."""

    nodes: Sequence[Mapping[str, Any]]
    refused: Mapping[str, str]
    secret: str

    @property
    def shared(self) -> bool:
        """Whether every node sees the runs folder of this machine."""
        return all(self.sees(node, "runs") for node in self.nodes)

    def sees(self, node: Mapping[str, Any], what: str) -> bool:
        """Whether a node reads the expected text in a token."""
        return bool(node.get("tokens", {}).get(what) == self.secret)


def problems(plan: LaunchPlan, cluster: Cluster, here: Mapping[str, str]) -> Iterator[Problem]:
    """Yield each reason why the cluster cannot run `plan`; `here` are the versions of this machine's packages."""
    answered = [node for node in cluster.nodes if node["error"] is None]
    for node in cluster.nodes:
        if node["error"] is not None:
            yield Problem(f"it does not answer: {node['error']}", node["address"], "remove or repair the node")
    yield from _resources(plan, cluster.nodes)
    yield from _folders(plan, cluster, answered)
    # nodes must have this machine's versions, or the first node's for packages that are missing here
    wanted = {**(answered[0]["versions"] if answered else {}), **here}
    yield from _stack(plan, wanted)
    for node in answered:
        yield from _node(plan, node, wanted)
    if not cluster.shared and "console" not in plan.spec.trainer.logger:
        yield Problem(
            "metrics must come from verl's console lines: no node shares the runs folder with this machine",
            "trainer.logger",
            "--set trainer.logger=[console,file], or FLASHRL_RUNS on a disk that all share",
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that verl needs on one node, with so many CPUs, and how often it needs them."""

    count: int
    devices: int
    cpus: int

    def on(self, devices: float, cpus: float) -> int:
        """How many of these groups a node has room for."""
        return max(0, int(min(devices // self.devices, cpus // self.cpus))) if self.count else 0


def _groups(plan: LaunchPlan) -> tuple[Group, Group]:
    """What the trainer needs on each of its nodes, and the devices of an engine with its own (none without such)."""
    asked = plan.spec.resources
    trainer = Group(asked.nodes, asked.gpus_per_node, CPUS_A_DEVICE * asked.gpus_per_node)
    if not asked.separate_devices:
        return trainer, Group(0, 1, 0)
    # an engine that is larger than a node's share spans several (verl/workers/rollout/replica.py:113)
    size = min(engine_devices(plan.spec), asked.rollout_gpus_per_node or 1)
    return trainer, Group(asked.separate_devices // size, size, CPUS_A_ROLLOUT_DEVICE * size)


def _fit(trainer: Group, rollout: Group, nodes: Sequence[tuple[float, float]]) -> bool:
    """Whether nodes with these devices and CPUs hold all groups, the trainer's on different nodes."""
    alone = [rollout.on(devices, cpus) for devices, cpus in nodes]
    # engines that a node has no room for once it holds a share of the trainer
    lost = sorted(
        alone[index] - rollout.on(devices - trainer.devices, cpus - trainer.cpus)
        for index, (devices, cpus) in enumerate(nodes)
        if trainer.on(devices, cpus)
    )
    return len(lost) >= trainer.count and sum(alone) - sum(lost[: trainer.count]) >= rollout.count


def _resources(plan: LaunchPlan, nodes: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """Yield what the nodes lack: verl needs all devices of a node's share on one node, each with its CPUs."""
    trainer, rollout = _groups(plan)
    if _fit(trainer, rollout, [(n["free_devices"], n["free_cpus"]) for n in nodes]):
        return
    there = "; ".join(
        f"{n['address']}: {n['free_devices']:g} of {n['devices']:g} GPUs and {n['free_cpus']:g} CPUs free"
        for n in nodes
    )
    needed = f"{counted(trainer.count, 'node')} with {_free(trainer)}"
    keys = "resources.nodes=… and resources.gpus_per_node=…"
    if rollout.count:
        needed += f" for the trainer, and beside them {counted(rollout.count, 'engine')} with {_free(rollout)}"
        keys += ", or resources.rollout_gpus_per_node=…"
    yield Problem(
        f"it needs {needed}; {there}",
        "resources",
        "wait for the jobs that hold them (`ray job list`), or --set resources.nodes=…"
        if _fit(trainer, rollout, [(n["devices"], CPUS_OF_ANY_NODE) for n in nodes])
        else f"--set {keys}, or a larger cluster",
    )


def _free(group: Group) -> str:
    return f"{counted(group.devices, 'free GPU')} and {group.cpus} free CPUs each"


def _folders(plan: LaunchPlan, cluster: Cluster, nodes: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """Yield folders that nodes do not share.

    Trainers write checkpoint shards and read them on any node, and so do the units that store what an asynchronous mode
    has sampled, which Ray spreads over all nodes (transfer_queue/utils/common.py:43).
    """
    folder = plan.paths.checkpoints.parent
    if reason := cluster.refused.get("checkpoints"):
        yield Problem(f"the head node cannot write there: {reason}", str(folder), "set FLASHRL_CHECKPOINTS")
    elif plan.spec.resources.nodes > 1 or plan.spec.trainer.mode != "sync":
        for node in nodes:
            if not cluster.sees(node, "checkpoints"):
                yield Problem(
                    f"checkpoints that several nodes write need a disk that all share; {folder} is the node's own",
                    node["address"],
                    "set FLASHRL_CHECKPOINTS to a folder on a shared disk",
                )


def _stack(plan: LaunchPlan, versions: Mapping[str, str]) -> Iterator[Problem]:
    yield from finding.problems(
        (
            *software.one_vllm(versions),
            *software.verl_version(versions),
            *software.stack_for(plan.spec.resources.platform, versions),
        )
    )


def _node(plan: LaunchPlan, node: Mapping[str, Any], wanted: Mapping[str, str]) -> Iterator[Problem]:
    where = node["address"]
    if different := list(_differences(node["versions"], wanted)):
        yield Problem(f"other versions there: {', '.join(different)}", where, "install one environment on all nodes")
    if node["missing"]:
        yield Problem(f"not there: {', '.join(node['missing'])}", where, "put them on a disk that all nodes share")
    if absent := [group for group in ENTRY_POINTS if group not in node["plugins"]]:
        fix = "`pip install --no-deps -e .` in a checkout of flashrl, on every node"
        yield Problem(f"flashrl's entry points are missing: {', '.join(absent)}", where, fix)
    given = {**plan.spec.env, **worker_variables(plan.spec.verl)}
    for found in gpus.vendors({**node["variables"], **given}, plan.spec.resources.gpus_per_node, preset=given):
        yield Problem(found.text, where, found.fix)
    if reason := gpus.lacks(plan.spec.rollout.precision, gpus.parse(node["gpus"])):
        instead = PRECISIONS[plan.spec.rollout.precision].instead
        yield Problem(reason, where, f"--rollout {instead}")


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    for name, version in wanted.items():
        there = found.get(name)
        if there is None:
            yield f"no {name} (wanted {version})"
        elif _compared(name, there) != _compared(name, version):
            yield f"{name} {there} (wanted {version})"


def _compared(name: str, version: str) -> str:
    """The part of a version that must be equal: Python's patch releases are compatible, anything else must match."""
    return ".".join(version.split(".")[:2]) if name == "python" else version

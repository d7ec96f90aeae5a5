"""What the answers of a cluster's nodes mean for a plan: pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.doctor import finding, gpus, software
from flashrl_cli.doctor.plugins import ENTRY_POINTS
from flashrl_cli.errors import Problem
from flashrl_cli.text import counted
from flashrl_cli.verl.cluster import CPUS_A_DEVICE, worker_variables

if TYPE_CHECKING:
    from flashrl_cli.launch.plan import LaunchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What `ray.nodes` told: a mapping of each alive node, the files that the head could not make, the text of the tokens."""

    nodes: Sequence[Mapping[str, Any]]
    refused: Mapping[str, str]
    secret: str

    @property
    def shared(self) -> bool:
        """Whether every node sees the runs folder of this machine."""
        return all(self.sees(node, "runs") for node in self.nodes)

    def sees(self, node: Mapping[str, Any], what: str) -> bool:
        """Whether a node reads the right text in a token."""
        return bool(node.get("tokens", {}).get(what) == self.secret)


def problems(plan: LaunchPlan, cluster: Cluster, here: Mapping[str, str]) -> Iterator[Problem]:
    """Yield all that keeps the cluster from running `plan`, one problem a node and kind; `here` are this machine's versions."""
    answered = [node for node in cluster.nodes if node["error"] is None]
    for node in cluster.nodes:
        if node["error"] is not None:
            yield Problem(f"it does not answer: {node['error']}", node["address"], "remove or mend the node")
    yield from _resources(plan, cluster.nodes)
    yield from _folders(plan, cluster, answered)
    wanted = here_or_first(here, answered)
    yield from _stack(plan, wanted)
    for node in answered:
        yield from _node(plan, node, wanted)
    if not cluster.shared and "console" not in plan.spec.trainer.logger:
        yield Problem(
            "metrics must come from verl's console lines: no node shares the runs folder with this machine",
            "trainer.logger",
            "--set trainer.logger=[console,file], or FLASHRL_RUNS on a disk that all share",
        )


def here_or_first(here: Mapping[str, str], nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The versions that all nodes must have: this machine's, and the first node's of what is not installed here."""
    first = nodes[0]["versions"] if nodes else {}
    return {**first, **here}


def _resources(plan: LaunchPlan, nodes: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """verl takes whole nodes' shares: all devices of one share on one node, each with its CPUs."""
    asked = plan.spec.resources
    cpus = CPUS_A_DEVICE * asked.gpus_per_node
    enough = [n for n in nodes if n["free_devices"] >= asked.gpus_per_node and n["free_cpus"] >= cpus]
    if len(enough) >= asked.nodes:
        return
    there = "; ".join(
        f"{n['address']}: {n['free_devices']:g} of {n['devices']:g} GPUs and {n['free_cpus']:g} CPUs free"
        for n in nodes
    )
    yield Problem(
        f"it needs {counted(asked.nodes, 'node')} with {counted(asked.gpus_per_node, 'free GPU')} and {cpus} free CPUs each; {there}",
        "resources",
        "wait for the jobs that hold them (`ray job list`), or --set resources.nodes=…"
        if sum(n["devices"] >= asked.gpus_per_node for n in nodes) >= asked.nodes
        else "--set resources.nodes=… and resources.gpus_per_node=…, or a larger cluster",
    )


def _folders(plan: LaunchPlan, cluster: Cluster, nodes: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """Every trainer process writes its shard of a checkpoint, and reads it again on whatever node it starts next."""
    folder = plan.paths.checkpoints.parent
    if reason := cluster.refused.get("checkpoints"):
        yield Problem(f"the head node cannot write there: {reason}", str(folder), "set FLASHRL_CHECKPOINTS")
    elif plan.spec.resources.nodes > 1:
        for node in nodes:
            if not cluster.sees(node, "checkpoints"):
                yield Problem(
                    f"checkpoints of several nodes need a disk that all share; {folder} is the node's own",
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
        instead = gpus.PRECISIONS[plan.spec.rollout.precision].instead
        yield Problem(reason, where, f"--rollout {instead}")


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    for name, version in wanted.items():
        there = found.get(name)
        if there is None:
            yield f"no {name} (wanted {version})"
        elif _compared(name, there) != _compared(name, version):
            yield f"{name} {there} (wanted {version})"


def _compared(name: str, version: str) -> str:
    """Python's patch releases are compatible; everything else must be the same."""
    return ".".join(version.split(".")[:2]) if name == "python" else version

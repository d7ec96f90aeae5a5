"""The proof that a precision is live: handshake files of the rollout workers, held against what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import contract
from flashrl_cli.verl.platform import rollout_options
from flashrl_cli.weights import Unreadable
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    from flashrl_cli.contract import Handshake
    from flashrl_cli.launch.plan import LaunchPlan


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must be proven: `workers` rollout workers that hold `precision`. No workers: nothing to prove.

    `smoothed` counts the tensors that a profile must have changed at the last refit; None means some, where the file is not here.
    """

    precision: str
    workers: int
    smoothed: int | None = 0


def expectation(plan: LaunchPlan) -> Expectation:
    """What a plan's rollout workers must prove; with verl's own worker extension (bf16, fp8-block on CUDA) nothing is written."""
    resources = plan.spec.resources
    ours = any(contract.WORKER_EXTENSION in str(override) for override in plan.overrides)
    workers = resources.nodes * resources.gpus_per_node if ours else 0
    return Expectation(plan.spec.rollout.precision, workers, smoothed=_smoothed(plan))


def _smoothed(plan: LaunchPlan) -> int | None:
    profile = rollout_options(plan.spec.rollout).profile
    try:
        return len(Profile.read(Path(profile)).names) if profile else 0
    except Unreadable:  # a cluster's nodes may see files that this machine does not
        return None


def refutation(expected: Expectation, shakes: list[Handshake]) -> str | None:
    """What the handshakes so far already disprove, or None. Every worker must hold the precision in some layer."""
    for shake in shakes:
        if shake.precision != expected.precision:
            return (
                f"{expected.precision} rollouts were asked for, but worker {shake.pid} on {shake.host} holds "
                f"{shake.precision} ({shake.quantized_layers} of {shake.linear_layers} linear layers quantized)"
            )
        if unlike := _unlike(expected.smoothed, shake.smoothed):
            return f"{unlike} were asked for, but worker {shake.pid} on {shake.host} smoothed {shake.smoothed}"
    return None


def _unlike(asked: int | None, smoothed: int) -> str | None:
    """What was asked for, unless this is it."""
    if asked is None:
        return None if smoothed else "tensors smoothed by rollout.profile"
    return None if smoothed == asked else f"{asked} tensors smoothed by rollout.profile"


def missing(expected: Expectation, shakes: list[Handshake]) -> str | None:
    """Once a step was sampled, every worker must have written its handshake: who has not, or None."""
    if len(shakes) >= expected.workers:
        return None
    return (
        f"{expected.precision} rollouts were asked for, but {len(shakes)} of {expected.workers} workers proved theirs"
    )


def read(folder: Path) -> list[Handshake]:
    """Handshakes written so far."""
    return list(contract.read_handshakes(folder))

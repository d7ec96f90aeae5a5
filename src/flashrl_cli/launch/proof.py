"""The proof that a precision is live: handshake files of the rollout workers, held against what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli import contract

if TYPE_CHECKING:
    from pathlib import Path

    from flashrl_cli.contract import Handshake
    from flashrl_cli.launch.plan import LaunchPlan


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must be proven: `workers` rollout workers that hold `precision`. No workers: nothing to prove.

    `lm_head` is the dtype in which they must compute logits, None for any.
    """

    precision: str
    workers: int
    lm_head: str | None = None


def expectation(plan: LaunchPlan) -> Expectation:
    """What a plan's rollout workers must prove; with verl's own worker extension (bf16, fp8-block on CUDA) nothing is written."""
    resources, rollout = plan.spec.resources, plan.spec.rollout
    ours = any(contract.WORKER_EXTENSION in str(override) for override in plan.overrides)
    workers = resources.nodes * resources.gpus_per_node if ours else 0
    return Expectation(rollout.precision, workers, lm_head="fp32" if rollout.lm_head_fp32 else None)


def refutation(expected: Expectation, shakes: list[Handshake]) -> str | None:
    """What the handshakes so far already disprove, or None. Every worker must hold the precision in some layer."""
    for shake in shakes:
        if shake.precision != expected.precision:
            return (
                f"{expected.precision} rollouts were asked for, but worker {shake.pid} on {shake.host} holds "
                f"{shake.precision} ({shake.quantized_layers} of {shake.linear_layers} linear layers quantized)"
            )
        if expected.lm_head not in {None, shake.lm_head}:
            return (
                f"logits in {expected.lm_head} were asked for, but worker {shake.pid} on {shake.host} computes them in "
                f"{shake.lm_head}"
            )
    return None


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

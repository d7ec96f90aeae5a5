"""The proof that a precision is live: handshake files of the rollout workers, held against what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import contract
from flashrl_cli.text import counted
from flashrl_cli.verl.config import bf16_replicas, engine_devices
from flashrl_cli.verl.environment import rollout_options
from flashrl_cli.weights import Unreadable
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    from flashrl_cli.contract import Handshake
    from flashrl_cli.train.plan import LaunchPlan


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must be proven: `workers` rollout workers that hold `precision` and a KV cache in `kv_cache`. No workers: nothing to prove.

    Exactly `bf16_workers` of them must hold bf16 instead; `lm_head` is the dtype in which all must compute logits, None for any.
    `smoothed` counts the tensors that a profile must have changed at the last refit; None means some, where the file is not here.
    """

    precision: str
    workers: int
    kv_cache: str = "auto"
    bf16_workers: int = 0
    lm_head: str | None = None
    smoothed: int | None = 0


def expectation(plan: LaunchPlan) -> Expectation:
    """What a plan's rollout workers must prove; with verl's own worker extension (bf16, fp8-block on CUDA) nothing is written."""
    resources, rollout = plan.spec.resources, plan.spec.rollout
    ours = any(contract.WORKER_EXTENSION in str(override) for override in plan.overrides)
    return Expectation(
        rollout.precision,
        resources.devices if ours else 0,
        rollout.kv_cache,
        bf16_workers=bf16_replicas(plan.spec) * engine_devices(plan.spec),
        lm_head="fp32" if rollout.lm_head_fp32 else None,
        smoothed=_smoothed(plan),
    )


def _smoothed(plan: LaunchPlan) -> int | None:
    profile = rollout_options(plan.spec).profile
    try:
        return len(Profile.read(Path(profile)).names) if profile else 0
    except Unreadable:  # a cluster's nodes may see files that this machine does not
        return None


def refutation(expected: Expectation, shakes: list[Handshake]) -> str | None:
    """What the handshakes so far already disprove, or None. Every worker must hold its precision in some layer."""
    reasons = (check(expected, shake) for shake in shakes for check in (_precision, _cache, _logits, _smoothing))
    return next(filter(None, reasons), None) or _mix(expected, shakes)


def _precision(expected: Expectation, shake: Handshake) -> str | None:
    if shake.precision == expected.precision or (expected.bf16_workers and shake.precision == "bf16"):
        return None
    return (
        f"{expected.precision} rollouts were asked for, but worker {shake.pid} on {shake.host} holds "
        f"{shake.precision} ({shake.quantized_layers} of {shake.linear_layers} linear layers quantized)"
    )


def _cache(expected: Expectation, shake: Handshake) -> str | None:
    if shake.kv_cache == expected.kv_cache:
        return None
    return (
        f"a KV cache in {expected.kv_cache} was asked for, but worker {shake.pid} on {shake.host} has {shake.kv_cache}"
    )


def _logits(expected: Expectation, shake: Handshake) -> str | None:
    if expected.lm_head in {None, shake.lm_head}:
        return None
    return (
        f"logits in {expected.lm_head} were asked for, but worker {shake.pid} on {shake.host} computes them in "
        f"{shake.lm_head}"
    )


def _smoothing(expected: Expectation, shake: Handshake) -> str | None:
    unlike = _unlike(expected.smoothed, shake.smoothed)
    return unlike and f"{unlike} were asked for, but worker {shake.pid} on {shake.host} smoothed {shake.smoothed}"


def _mix(expected: Expectation, shakes: list[Handshake]) -> str | None:
    """Too many workers of one precision are too few of the other once all have written."""
    if not expected.bf16_workers:
        return None
    bf16 = sum(shake.precision == "bf16" for shake in shakes)
    others, quantized = len(shakes) - bf16, expected.workers - expected.bf16_workers
    if bf16 <= expected.bf16_workers and others <= quantized:
        return None
    return (
        f"{expected.bf16_workers} of {expected.workers} rollout workers were to stay in bf16 and {quantized} to take "
        f"{expected.precision}, but {bf16} hold bf16 and {others} {expected.precision}"
    )


def _unlike(asked: int | None, smoothed: int) -> str | None:
    """What was asked for, unless this is it."""
    if asked is None:
        return None if smoothed else "tensors smoothed by rollout.profile"
    return None if smoothed == asked else f"{counted(asked, 'tensor')} smoothed by rollout.profile"


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

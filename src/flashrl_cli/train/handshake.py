"""The proof that a precision is in effect: the rollout workers' handshakes, compared with the request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import contract
from flashrl_cli.precision import PRECISIONS
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
    """What must be proven: `workers` rollout workers hold `precision` and a KV cache in `kv_cache`; 0 for nothing.

    Exactly `bf16_workers` of them must hold bf16 instead; `lm_head` is the dtype in which all must compute logits, None
    for any. `smoothed` is the number of tensors that a profile must have changed at the last refit; None means at least
    one, because the profile is not on this machine. `rotation` is the block by which quantized layers must rotate their
    input, 0 for none; None means any block, because the model's sizes are not known on this machine.
    """

    precision: str
    workers: int
    kv_cache: str = "auto"
    bf16_workers: int = 0
    lm_head: str | None = None
    smoothed: int | None = 0
    rotation: int | None = 0


def expectation(plan: LaunchPlan) -> Expectation:
    """What a plan's rollout workers must prove: nothing with verl's own worker extension (bf16, fp8-block on CUDA)."""
    resources, rollout = plan.spec.resources, plan.spec.rollout
    ours = any(contract.WORKER_EXTENSION in str(override) for override in plan.overrides)
    return Expectation(
        rollout.precision,
        resources.rollout_devices if ours else 0,
        rollout.kv_cache,
        bf16_workers=bf16_replicas(plan.spec) * engine_devices(plan.spec),
        lm_head="fp32" if rollout.lm_head_fp32 else None,
        smoothed=_smoothed(plan),
        rotation=_rotation(plan),
    )


def _smoothed(plan: LaunchPlan) -> int | None:
    profile = rollout_options(plan.spec).profile
    try:
        return len(Profile.read(Path(profile)).names) if profile else 0
    except Unreadable:  # nodes of a cluster may see files that this machine does not
        return None


def _rotation(plan: LaunchPlan) -> int | None:
    asked = rollout_options(plan.spec).rotation
    if not PRECISIONS[plan.spec.rollout.precision].rotates:
        return 0
    return asked if isinstance(asked, int) else None


def refutation(expected: Expectation, handshakes: list[Handshake]) -> str | None:
    """What the handshakes so far already disprove, or None. Every worker must hold its precision in some layer."""
    reasons = (
        check(expected, one) for one in handshakes for check in (_precision, _cache, _logits, _smoothing, _turned)
    )
    return next(filter(None, reasons), None) or _mix(expected, handshakes)


def _precision(expected: Expectation, found: Handshake) -> str | None:
    if found.precision == expected.precision or (expected.bf16_workers and found.precision == "bf16"):
        return None
    return (
        f"{expected.precision} rollouts were asked for, but worker {found.pid} on {found.host} holds "
        f"{found.precision} ({found.quantized_layers} of {found.linear_layers} linear layers quantized)"
    )


def _cache(expected: Expectation, found: Handshake) -> str | None:
    if found.kv_cache == expected.kv_cache:
        return None
    return (
        f"a KV cache in {expected.kv_cache} was asked for, but worker {found.pid} on {found.host} has {found.kv_cache}"
    )


def _logits(expected: Expectation, found: Handshake) -> str | None:
    if expected.lm_head in {None, found.lm_head}:
        return None
    return (
        f"logits in {expected.lm_head} were asked for, but worker {found.pid} on {found.host} computes them in "
        f"{found.lm_head}"
    )


def _smoothing(expected: Expectation, found: Handshake) -> str | None:
    asked = expected.smoothed
    if found.smoothed == asked or (asked is None and found.smoothed):
        return None
    tensors = "tensors" if asked is None else counted(asked, "tensor")
    return (
        f"{tensors} smoothed by rollout.profile were asked for, but worker {found.pid} on {found.host} smoothed "
        f"{found.smoothed}"
    )


def _turned(expected: Expectation, found: Handshake) -> str | None:
    asked = expected.rotation
    if found.rotation == asked or (asked is None and found.rotation) or found.precision == "bf16":
        return None
    wanted = "inputs rotated by blocks" if asked is None else f"inputs rotated by blocks of {asked}"
    held = f"rotates them by blocks of {found.rotation}" if found.rotation else "rotates none"
    if asked == 0:
        return f"no rotation was asked for, but worker {found.pid} on {found.host} {held}"
    return f"{wanted} were asked for, but worker {found.pid} on {found.host} {held}"


def _mix(expected: Expectation, handshakes: list[Handshake]) -> str | None:
    """Report too many workers of one precision: once all have written, there will be too few of the other."""
    if not expected.bf16_workers:
        return None
    bf16 = sum(one.precision == "bf16" for one in handshakes)
    others, quantized = len(handshakes) - bf16, expected.workers - expected.bf16_workers
    if bf16 <= expected.bf16_workers and others <= quantized:
        return None
    return (
        f"{expected.bf16_workers} of {expected.workers} rollout workers were to stay in bf16 and {quantized} to take "
        f"{expected.precision}, but {bf16} hold bf16 and {others} {expected.precision}"
    )


def missing(expected: Expectation, handshakes: list[Handshake]) -> str | None:
    """The workers whose handshake is missing, or None; every worker must have written one once a step was sampled."""
    if len(handshakes) >= expected.workers:
        return None
    proven = f"{len(handshakes)} of {expected.workers} workers proved theirs"
    return f"{expected.precision} rollouts were asked for, but {proven}"

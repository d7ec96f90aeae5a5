"""The one change of a run that would reduce its memory best, found by trying candidates on the estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashrl_cli.verl.config import SET_KEYS

if TYPE_CHECKING:
    from flashrl_cli.verl.config import EngineSettings, TrainerSettings

Score = Callable[["TrainerSettings"], tuple[int, int]]
"""Rank of the verdict (0 if the run fits) and peak in bytes."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A key for `--set`, its value, and whether the run then fits."""

    key: str
    value: bool | int | float
    fits: bool

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"--set {self.key}={shown}"


Candidate = tuple[str, Any, "TrainerSettings"]


def best(settings: TrainerSettings, score: Score) -> Advice | None:
    """The first candidate with which the run fits, else the one that lowers the peak most.

    Candidates are ordered by their cost.
    """
    start = score(settings)
    tried = [(score(changed), name, value) for name, value, changed in candidates(settings)]
    fitting = [entry for entry in tried if entry[0][0] == 0]
    if fitting:
        _, name, value = fitting[0]
        return Advice(SET_KEYS[name], value, fits=True)
    better = [entry for entry in tried if entry[0] < start]
    if not better:
        return None
    _, name, value = min(better, key=lambda entry: entry[0])
    return Advice(SET_KEYS[name], value, fits=False)


def candidates(settings: TrainerSettings) -> Iterator[Candidate]:
    """Changes in the order of their cost: recomputation and transfers first, then smaller passes, then more GPUs."""
    yield from _switches(settings)
    yield from _engine(settings)
    yield from _smaller_passes(settings)
    yield from _smaller_critic(settings)
    tensor_parallel = settings.rollout.tensor_parallel * 2
    if tensor_parallel <= settings.gpus_per_node:
        yield "tensor_parallel", tensor_parallel, _rollout(settings, tensor_parallel=tensor_parallel)
    for gpus in (2, 4, 8):
        if gpus > settings.gpus_per_node:
            yield "gpus_per_node", gpus, replace(settings, gpus_per_node=gpus)


def _switches(settings: TrainerSettings) -> Iterator[Candidate]:
    """Switches that are off, of the policy and a critic together where one key sets both."""
    actor, critic = settings.actor, settings.critic
    # verl's remove-padding needs flash-attn on a GPU
    names = ["remove_padding"] if actor.flash_attention else []
    for name in (*names, "checkpointing"):
        if not getattr(actor, name):
            both = critic and _switched(critic, name)
            yield name, True, replace(settings, actor=_switched(actor, name), critic=both)
    names = ["fused_kernels", "optimizer_offload", "param_offload"]
    for name in (*names, *(["offload_policy"] if actor.strategy == "fsdp2" else [])):
        if not getattr(actor, name):
            yield name, True, replace(settings, actor=_switched(actor, name))
    for name in ("optimizer_offload", "param_offload"):
        if critic and not getattr(critic, name):
            yield f"critic_{name}", True, replace(settings, critic=_switched(critic, name))


def _engine(settings: TrainerSettings) -> Iterator[Candidate]:
    """Values of the engine's share of the GPU around the present one, the nearest first."""
    share = settings.rollout.gpu_memory_utilization
    for step in range(1, 13):
        for value in (round(share - 0.05 * step, 2), round(share + 0.05 * step, 2)):
            if 0.15 <= value <= 0.95:
                yield "gpu_memory_utilization", value, _rollout(settings, gpu_memory_utilization=value)


def _smaller_passes(settings: TrainerSettings) -> Iterator[Candidate]:
    actor = settings.actor
    for count in _halves(actor.train.sequences, 1):
        yield "micro_batch", count, replace(settings, actor=replace(actor, train=replace(actor.train, sequences=count)))
    least = -(-settings.length // actor.sequence_parallel)
    for count in _halves(actor.infer.tokens, least):
        infer = replace(actor.infer, tokens=count)
        yield "log_prob_tokens", count, replace(settings, actor=replace(actor, infer=infer))
    for count in _halves(actor.train.tokens, least):
        budget = replace(actor.train, tokens=count)
        infer = budget if settings.log_probs_follow else actor.infer
        yield "token_budget", count, replace(settings, actor=replace(actor, train=budget, infer=infer))
    for count in _halves(actor.infer.sequences, 1):
        infer = replace(actor.infer, sequences=count)
        yield "log_prob_micro_batch", count, replace(settings, actor=replace(actor, infer=infer))
    for count in _halves(settings.rollout.max_num_batched_tokens, max(2048, settings.rollout.max_num_seqs)):
        yield "max_num_batched_tokens", count, _rollout(settings, max_num_batched_tokens=count)


def _smaller_critic(settings: TrainerSettings) -> Iterator[Candidate]:
    critic = settings.critic
    if critic is None:
        return
    for count in _halves(critic.train.tokens, settings.length):
        budget = replace(critic.train, tokens=count)
        yield "critic_tokens", count, replace(settings, critic=replace(critic, train=budget, infer=budget))


def _switched(engine: EngineSettings, name: str) -> EngineSettings:
    changes: dict[str, Any] = {name: True}
    return replace(engine, **changes)


def _halves(value: int | None, least: int) -> Iterator[int]:
    """A count halved again and again while it stays an integer and is not below the minimum."""
    while value and value % 2 == 0 and value // 2 >= least:
        value //= 2
        yield value


def _rollout(settings: TrainerSettings, **changes: Any) -> TrainerSettings:
    return replace(settings, rollout=replace(settings.rollout, **changes))

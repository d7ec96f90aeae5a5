"""What the estimate advises: the change that would reduce a run's memory best, or what to spend free memory on.

Both are found by trying candidates on the estimate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashrl_cli.memory.parts import model_of
from flashrl_cli.verl.config import SET_KEYS, Batch
from flashrl_cli.weights.shape import parameters

if TYPE_CHECKING:
    from flashrl_cli.verl.config import EngineSettings, TrainerSettings
    from flashrl_cli.weights.shape import ModelShape

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
    if tensor_parallel <= (settings.rollout_gpus or settings.gpus_per_node):
        yield "tensor_parallel", tensor_parallel, _rollout(settings, tensor_parallel=tensor_parallel)
    for gpus in (2, 4, 8):
        if gpus > settings.gpus_per_node:
            yield "gpus_per_node", gpus, replace(settings, gpus_per_node=gpus)


def _switches(settings: TrainerSettings) -> Iterator[Candidate]:
    """Switches that are off, of the policy and a critic together where one key sets both."""
    actor, critic = settings.actor, settings.critic
    names = ["remove_padding"] if actor.packable else []
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


def _switched(engine: EngineSettings, name: str, *, to: bool = True) -> EngineSettings:
    changes: dict[str, Any] = {name: to}
    return replace(engine, **changes)


def _halves(value: int | None, least: int) -> Iterator[int]:
    """A count halved again and again while it stays an integer and is not below the minimum."""
    while value and value % 2 == 0 and value // 2 >= least:
        value //= 2
        yield value


def _rollout(settings: TrainerSettings, **changes: Any) -> TrainerSettings:
    return replace(settings, rollout=replace(settings.rollout, **changes))


BUSY = 4e14
"""FLOP a second of a busy GPU: 40 % of an H100's peak in bf16."""
ENOUGH_WORK = 4e12
"""Parameters times tokens of a pass that take a GPU longer than Python needs to launch their kernels: 60 ms at
400 Tflop/s forward and backward, against 1 to 2 ms a layer."""
COPIED = 10e9
"""Bytes a second between GPU and CPU, from memory that is not pinned."""
DEAR = 0.05
"""Share of a step's arithmetic from which copies of offloaded states are worth a word."""
LARGEST_SHARE = 0.9
"""Share of a GPU's memory beyond which an engine is not advised to go."""
FEW_PASSES = 4
"""Passes of a mini-batch up to which their size is not worth changing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How the policy update computes a mini-batch: the number of passes, and the tokens of each."""

    count: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spare:
    """What costs time and saves memory that the estimate says is free; all of it fits at once."""

    passes: Passes | None = None
    """Passes of the policy update, if they are small and passes of twice their size fit."""
    recompute: bool = False
    """Whether recomputation of activations can go, of policy and critic."""
    offloads: tuple[str, ...] = ()
    """Offloads of the policy that can go, of those that cost time: `param_offload`, `optimizer_offload`."""
    critic_offloads: tuple[str, ...] = ()
    engine_share: float | None = None
    """The largest share of a GPU's memory that its engine can take, in steps of 0.05; None for no more than now."""


def spare(settings: TrainerSettings, shape: ModelShape, fits: Callable[[TrainerSettings], bool]) -> Spare:
    """What a run that fits could do without: small passes first, then recomputation, then offload."""
    passes = _small_passes(settings, shape)
    larger = updating(settings, max(2 * passes.tokens, settings.length)) if passes else settings
    passes = passes if fits(larger) else None
    current = larger if passes else settings
    without = recomputing(current, False)
    recompute = without != current and fits(without)
    current = without if recompute else current
    gone: dict[str, tuple[str, ...]] = {"actor": (), "critic": ()}
    dear = DEAR * work_s(current, shape)
    for role, name in itertools.product(gone, ("param_offload", "optimizer_offload")):
        engine = getattr(current, role)
        if engine and getattr(engine, name) and _transfer_s(current, shape, engine, name) > dear:
            changes: dict[str, Any] = {role: _switched(engine, name, to=False)}
            if fits(changed := replace(current, **changes)):
                current, gone[role] = changed, (*gone[role], name)
    share = None
    for step in range(1, 20):
        value = round(settings.rollout.gpu_memory_utilization + 0.05 * step, 2)
        if value > LARGEST_SHARE or not fits(_rollout(current, gpu_memory_utilization=value)):
            break
        share = value
    return Spare(
        passes=passes,
        recompute=recompute,
        offloads=gone["actor"],
        critic_offloads=gone["critic"],
        engine_share=share,
    )


def work_s(settings: TrainerSettings, shape: ModelShape) -> float:
    """Seconds of arithmetic of a step's log-probs and update on a busy GPU: 8 FLOP a parameter and token."""
    tokens = settings.train_batch * settings.n * settings.length * settings.mean_share / settings.world
    return 8 * active(shape) * tokens / BUSY


def _transfer_s(settings: TrainerSettings, shape: ModelShape, engine: EngineSettings, name: str) -> float:
    """Seconds of a step in which offloaded states are copied.

    Parameters are loaded for log-probs, update and weight update, and offloaded after each; optimizer state only for
    the update.
    """
    model = model_of(shape, engine, settings.world)
    return (6 * model.params if name == "param_offload" else 2 * model.adam) / COPIED


def active(shape: ModelShape) -> float:
    """Parameters without those of the experts that a token does not take."""
    counts = parameters(shape)
    idle = 1 - shape.experts_per_token / shape.experts if shape.experts else 0
    return counts.total - idle * counts.experts


def recomputing(settings: TrainerSettings, recompute: bool) -> TrainerSettings:
    """Settings of a run whose policy and critic compute activations again, or do not."""
    critic = settings.critic and replace(settings.critic, checkpointing=recompute)
    return replace(settings, actor=replace(settings.actor, checkpointing=recompute), critic=critic)


def updating(settings: TrainerSettings, tokens: int) -> TrainerSettings:
    """Settings of a run whose policy is updated in passes of `tokens`."""
    return replace(settings, actor=replace(settings.actor, train=Batch(tokens=tokens)))


def _small_passes(settings: TrainerSettings, shape: ModelShape) -> Passes | None:
    """The passes of the policy update if they are many and do not fill the GPU; sequences have their mean length."""
    actor, mean = settings.actor, settings.length * settings.mean_share
    batch = settings.mini_batch * settings.n * mean / settings.world
    tokens = actor.train.tokens or (actor.train.sequences or 1) * mean / actor.sequence_parallel
    count = math.ceil(batch / tokens)
    if count <= FEW_PASSES or tokens * active(shape) >= ENOUGH_WORK:
        return None
    return Passes(count=count, tokens=round(tokens))

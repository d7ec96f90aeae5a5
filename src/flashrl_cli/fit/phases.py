"""The phases of a training step as verl's hybrid engine runs them, and what lies on one GPU in each.

Trainer and engine share the GPUs: the engine sleeps while the trainer works, and what the trainer does not offload stays while
the engine samples (verl/workers/engine_workers.py:728, update_weights; verl/workers/engine/base.py:314).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli.fit import passes, serving
from flashrl_cli.fit.items import Item, item, total
from flashrl_cli.fit.states import Model, model_of, resident
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.fit.serving import Engine
    from flashrl_cli.fit.shape import ModelShape
    from flashrl_cli.verl.memory_keys import TrainerSettings

TRAINER_CONTEXT = 1480 << 20
"""Bytes of a trainer process outside torch: 1,473 MiB measured under FSDP1 on two GPUs, of which 523 are the CUDA context."""
ENGINE_CONTEXT = 512 << 20
"""Bytes of an engine's CUDA context, which vLLM does not count against its budget; taken to be as large as the trainer's."""
ASLEEP = {"bf16": 600 << 20, "int8": 1000 << 20, "fp8": 1950 << 20, "fp8-block": 1950 << 20}
"""Bytes that a sleeping engine keeps beside context and graphs; measured: 0.5 to 0.6 GiB for bf16, 0.4 to 1.0 for int8, 1.5 to 1.9 for
both kinds of fp8."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase and its peak on a GPU."""

    name: str
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        """Peak of the phase."""
        return total(self.items)

    @property
    def at_worst(self) -> float:
        """Peak with the margin of every item on top."""
        return sum(part.bytes * (1 + part.margin) for part in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that the phases need, worked out once."""

    settings: TrainerSettings
    shape: ModelShape
    actor: Model
    critic: Model | None
    critic_shape: ModelShape
    engine: Engine


def run_of(settings: TrainerSettings, shape: ModelShape, critic_shape: ModelShape | None, gpu_bytes: int) -> Run:
    """Models and engine of a run; without a shape of its own the critic starts from the policy."""
    value = critic_shape or shape
    return Run(
        settings=settings,
        shape=shape,
        actor=model_of(shape, settings.actor, settings.world),
        critic=model_of(value, settings.critic, settings.world, critic=True) if settings.critic else None,
        critic_shape=value,
        engine=serving.engine(shape, settings, gpu_bytes),
    )


def phases(run: Run) -> tuple[Phase, ...]:
    """The phases of a step, in order."""
    found = [Phase("rollout", (*_awake(run), *_idle(run))), Phase("log-probs", _log_probs(run))]
    if run.critic:
        found.append(Phase("critic update", _critic_update(run, run.critic)))
    found += [Phase("actor update", _actor_update(run)), Phase("weight update", _weight_update(run))]
    return tuple(found)


def _awake(run: Run) -> tuple[Item, ...]:
    """The engine's budget, in its parts."""
    engine, rollout = run.engine, run.settings.rollout
    gpus = f"{rollout.precision}, / {counted(rollout.tensor_parallel, 'GPU')}"
    share = f"{rollout.gpu_memory_utilization:g} of the GPU, less weights and working memory"
    return (
        item("engine weights", engine.weights, gpus, margin=0),
        item("engine working memory", engine.working, "one full batch, CUDA graphs", margin=0),
        item("KV cache", engine.kv, share, margin=0),
        item("engine context", ENGINE_CONTEXT, "CUDA context of the engine"),
    )


def _asleep(run: Run) -> tuple[Item, ...]:
    """The engine while the trainer works; without sleep it keeps everything, on GPUs of its own it is not there."""
    if not run.settings.colocated:
        return ()
    if not run.settings.rollout.sleeps:
        return _awake(run)
    rollout = run.settings.rollout
    kept = ENGINE_CONTEXT + serving.graphs(run.shape, rollout) + ASLEEP[rollout.precision]
    return (item("sleeping engine", kept, f"CUDA context, graphs, buffers of {rollout.precision}"),)


def _idle(run: Run) -> tuple[Item, ...]:
    """What the trainer leaves on the GPU while the engine samples."""
    if not run.settings.colocated:
        return ()
    critic = resident(run.critic, "critic") if run.critic else ()
    return (*_context(), *resident(run.actor, "actor"), *critic)


def _context() -> tuple[Item, ...]:
    return (item("trainer context", TRAINER_CONTEXT, "CUDA context, NCCL"),)


def _log_probs(run: Run) -> tuple[Item, ...]:
    """The larger of the policy's old log-probs, the reference's and the values of the critic."""
    settings, actor = run.settings, run.actor
    own = passes.inference(run.shape, actor, settings, actor.engine.infer, logits=True, entropy=True)
    loaded = resident(actor, "actor", loaded=True)
    idle = resident(run.critic, "critic") if run.critic else ()
    found = [(*loaded, *idle, *own)]
    if settings.reference:
        # the reference is kept on the CPU and gathered layer by layer (verl/workers/engine/fsdp/transformer_impl.py:429)
        other = passes.inference(run.shape, actor, settings, settings.reference, logits=True, entropy=False)
        found.append((*resident(actor, "actor"), *idle, *other))
    if run.critic:
        values = _values(run, run.critic)
        found.append((*resident(actor, "actor"), *resident(run.critic, "critic", loaded=True), *values))
    return (*_asleep(run), *_context(), *max(found, key=total))


def _values(run: Run, critic: Model) -> tuple[Item, ...]:
    return passes.inference(run.critic_shape, critic, run.settings, critic.engine.infer, logits=False, entropy=False)


def _critic_update(run: Run, critic: Model) -> tuple[Item, ...]:
    update = passes.training(run.critic_shape, critic, run.settings, "critic")
    return (*_asleep(run), *_context(), *resident(run.actor, "actor"), *update)


def _actor_update(run: Run) -> tuple[Item, ...]:
    idle = resident(run.critic, "critic") if run.critic else ()
    return (*_asleep(run), *_context(), *idle, *passes.training(run.shape, run.actor, run.settings, "actor"))


def _weight_update(run: Run) -> tuple[Item, ...]:
    """Weights go one full tensor at a time through a bucket that the engine copies from (verl bucketed_weight_transfer.py).

    FSDP1 exports a second copy of its shards; FSDP2 stages tensors from wherever they are (transformer_impl.py:977, get_per_tensor_param).
    """
    actor = run.actor
    size = actor.engine.model_bytes
    first = actor.engine.strategy == "fsdp"
    largest = (
        max(
            run.shape.vocab * run.shape.hidden, 2 * run.shape.experts * run.shape.expert_intermediate * run.shape.hidden
        )
        * size
    )
    parts = [*_context(), *_idle_or_loaded(run, loaded=first and not actor.engine.param_offload)]
    if first:
        parts.append(item("exported shards", actor.params, "FSDP1's state_dict copies them"))
    parts.append(item("full tensor", largest, f"largest of the model, {size} B each"))
    if run.settings.colocated:
        parts += [
            item(
                "buckets", max(run.settings.bucket, largest) + run.settings.bucket, "the sender's and the engine's copy"
            ),
            item("engine weights", run.engine.weights, f"{run.settings.rollout.precision}, awake again"),
            *_asleep(run),
        ]
    return tuple(parts)


def _idle_or_loaded(run: Run, *, loaded: bool) -> tuple[Item, ...]:
    critic = resident(run.critic, "critic") if run.critic else ()
    return (*resident(run.actor, "actor", loaded=loaded), *critic)

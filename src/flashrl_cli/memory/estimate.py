"""Estimate of whether a run fits into GPU memory: the peak of each phase of a training step, a verdict and advice.

Trainer and engine share the GPUs of verl's hybrid engine: the engine sleeps while the trainer works, and states that
the trainer does not offload stay on the GPU while the engine samples (verl/workers/engine_workers.py:728,
update_weights; verl/workers/engine/base.py:314). Under `separate_async` there are two kinds of GPUs, each with phases
of its own: the trainer's hold no engine, the engines' no trainer (verl/trainer/ppo/v1/trainer_separate_async.py:153).
The estimate depends only on the composed configuration, the model's shape and the GPU's size. Formulas and their
sources are in docs/memory-model.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from flashrl_cli.memory import advise, parts
from flashrl_cli.memory.parts import Item, Model, item, model_of, resident, total
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.text import GIB, counted
from flashrl_cli.verl.config import Settings, TrainerSettings, trainer_settings

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.memory.advise import Advice, Spare
    from flashrl_cli.memory.parts import Engine
    from flashrl_cli.verl.compose import Tree
    from flashrl_cli.weights.shape import ModelShape

H100_BYTES = 81_559 << 20
"""GPU size that is assumed if no GPU can be queried: an H100 of 80 GB, as nvidia-smi reports it."""
TRAINER_CONTEXT = 1480 << 20
"""Bytes of a trainer process outside torch: 1,473 MiB measured under FSDP1 on two GPUs, of which 523 MiB are the CUDA
context.
"""
ENGINE_CONTEXT = 512 << 20
"""Bytes of an engine's CUDA context, which vLLM does not count against its budget; assumed to be as large as the
trainer's.
"""
Verdict = Literal["fits", "tight", "over"]
Side = Literal["trainer", "rollout"]
RANK: dict[Verdict, int] = {"fits": 0, "tight": 1, "over": 2}


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase and its memory on a GPU."""

    name: str
    items: tuple[Item, ...]
    side: Side | None = None
    """Whose GPUs they are, in a run whose engines have their own."""

    @property
    def title(self) -> str:
        """The name, with whose GPUs are meant where there are two kinds."""
        return f"{self.name} ({self.side} GPUs)" if self.side else self.name

    @property
    def bytes(self) -> int:
        """Peak of the phase in bytes."""
        return total(self.items)

    @property
    def at_worst(self) -> float:
        """Peak in bytes if every item reaches its margin."""
        return sum(part.bytes * (1 + part.margin) for part in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Peak memory of a run on one GPU, of each kind if there are two."""

    gpu_bytes: int
    phases: tuple[Phase, ...]
    least: int
    """Bytes of the peak if all sequences have the maximum length, so that no memory is lost to padding."""
    kv_tokens: int
    """Capacity of one engine's KV cache in tokens."""
    wanted_tokens: int
    """Tokens of all sequences that an engine may run at once, each at its maximum length."""
    starts: bool
    """Whether the KV cache holds one sequence of `max_model_len`, without which vLLM does not start."""
    verdict: Verdict
    advice: Advice | None
    spare: Spare
    """What costs time and need not be, if the run fits."""
    kinds: tuple[tuple[Side, int], ...] = ()
    """Number of GPUs of each kind, where the engines have GPUs of their own."""
    host: int = 0
    """Bytes of CPU memory of a trainer process for copies of the policy."""

    @property
    def peak(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.bytes)


def estimate(
    resolved: Resolved,
    tree: Tree,
    shape: ModelShape,
    critic_shape: ModelShape | None = None,
    gpu_bytes: int = H100_BYTES,
) -> Estimate:
    """Estimate for a resolved preset and its composed configuration, on GPUs of `gpu_bytes`.

    Without `critic_shape` a critic has the policy's shape. Raises ValueError for a training engine other than FSDP.
    """
    return of_settings(trainer_settings(Settings(resolved, (), tree)), shape, critic_shape, gpu_bytes)


def of_settings(
    settings: TrainerSettings, shape: ModelShape, critic_shape: ModelShape | None, gpu_bytes: int
) -> Estimate:
    """Estimate for a run that is given by its settings."""

    def peaks(changed: TrainerSettings) -> tuple[Engine, tuple[Phase, ...], int]:
        run = run_of(changed, shape, critic_shape, gpu_bytes)
        unpadded = run_of(replace(changed, mean_share=1.0), shape, critic_shape, gpu_bytes)
        return run.engine, phases(run), max(phase.bytes for phase in phases(unpadded))

    def score(changed: TrainerSettings) -> tuple[int, int]:
        if not possible(changed, shape):
            return len(RANK), 0
        engine, after, least = peaks(changed)
        return RANK[judge(engine, after, least, gpu_bytes)], max(phase.bytes for phase in after)

    engine, found, least = peaks(settings)
    judged = judge(engine, found, least, gpu_bytes)
    return Estimate(
        gpu_bytes=gpu_bytes,
        phases=found,
        least=least,
        kv_tokens=engine.kv_tokens,
        wanted_tokens=engine.wanted_tokens,
        starts=engine.starts,
        verdict=judged,
        advice=advise.best(settings, score) if judged != "fits" else None,
        spare=advise.spare(settings, shape, lambda changed: score(changed)[0] == 0)
        if judged == "fits"
        else advise.Spare(),
        kinds=() if settings.colocated else (("rollout", settings.rollout_gpus), ("trainer", settings.world)),
        host=copies(run_of(settings, shape, critic_shape, gpu_bytes)),
    )


def judge(engine: Engine, found: tuple[Phase, ...], least: int, gpu_bytes: int) -> Verdict:
    """The verdict on the phases of a run.

    It is `over` if even the `least` peak exceeds the GPU or vLLM cannot start, and `tight` if padding or the margins
    might exceed the GPU.
    """
    if not engine.starts or least > gpu_bytes:
        return "over"
    return "tight" if any(phase.at_worst > gpu_bytes for phase in found) else "fits"


def possible(settings: TrainerSettings, shape: ModelShape) -> bool:
    """Whether verl and vLLM accept the numbers of GPUs.

    Heads must divide over an engine's GPUs, responses over the trainers.
    """
    parts = settings.actor.sequence_parallel
    responses, tensor_parallel = settings.mini_batch * settings.n * parts, settings.rollout.tensor_parallel
    engines = (settings.rollout_gpus or settings.world) % tensor_parallel == 0
    return engines and shape.heads % tensor_parallel == 0 and responses % settings.world == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All values that the phases need, computed once."""

    settings: TrainerSettings
    shape: ModelShape
    actor: Model
    critic: Model | None
    critic_shape: ModelShape
    engine: Engine


def run_of(settings: TrainerSettings, shape: ModelShape, critic_shape: ModelShape | None, gpu_bytes: int) -> Run:
    """Models and engine of a run; without a `critic_shape` the critic has the policy's shape."""
    value = critic_shape or shape
    return Run(
        settings=settings,
        shape=shape,
        actor=model_of(shape, settings.actor, settings.world),
        critic=model_of(value, settings.critic, settings.world, critic=True) if settings.critic else None,
        critic_shape=value,
        engine=parts.engine(shape, settings, gpu_bytes),
    )


def phases(run: Run) -> tuple[Phase, ...]:
    """The phases of a step, in order; those of the engines' own GPUs first, if they have any."""
    update = [Phase("log-probs", _log_probs(run))]
    if run.critic:
        update.append(Phase("critic update", _critic_update(run, run.critic)))
    update += [Phase("actor update", _actor_update(run)), Phase("weight update", _weight_update(run))]
    if run.settings.colocated:
        return (Phase("rollout", (*_awake(run), *_idle(run))), *update)
    rollout = Phase("rollout", (*_awake(run), *_receiver()), "rollout")
    return (rollout, Phase("refit", _refit(run), "rollout"), *(replace(phase, side="trainer") for phase in update))


def _awake(run: Run) -> tuple[Item, ...]:
    """The engine's memory budget, in its parts."""
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
    """The engine's memory while the trainer works, all of it if it does not sleep."""
    if not run.settings.rollout.sleeps:
        return _awake(run)
    rollout = run.settings.rollout
    kept = ENGINE_CONTEXT + parts.graphs(run.shape, rollout) + PRECISIONS[rollout.precision].asleep_bytes
    return (item("sleeping engine", kept, f"CUDA context, graphs, buffers of {rollout.precision}"),)


def _beside(run: Run) -> tuple[Item, ...]:
    """The engine's memory on the trainer's GPUs while the trainer works: none if it has its own."""
    return _asleep(run) if run.settings.colocated else ()


def _idle(run: Run) -> tuple[Item, ...]:
    """The trainer's states that stay on the GPU while the engine samples."""
    critic = resident(run.critic, "critic") if run.critic else ()
    return (*_context(), *resident(run.actor, "actor"), *critic)


def _receiver() -> tuple[Item, ...]:
    """The process beside an engine that receives the weights (verl/checkpoint_engine/base.py, CheckpointEngineWorker).

    It is assumed to hold outside torch what a trainer does.
    """
    return (item("receiving process", TRAINER_CONTEXT, "its CUDA context, NCCL"),)


def _context() -> tuple[Item, ...]:
    return (item("trainer context", TRAINER_CONTEXT, "CUDA context, NCCL"),)


def _log_probs(run: Run) -> tuple[Item, ...]:
    """The largest of three passes: the policy's old log-probs, the reference's log-probs and the critic's values."""
    settings, actor = run.settings, run.actor
    own = parts.inference(run.shape, actor, settings, actor.engine.infer, logits=True, entropy=True)
    loaded = resident(actor, "actor", loaded=True)
    idle = resident(run.critic, "critic") if run.critic else ()
    found = [(*loaded, *idle, *own)]
    if settings.reference:
        # the reference is kept on the CPU and gathered layer by layer
        # (verl/workers/engine/fsdp/transformer_impl.py:429)
        other = parts.inference(run.shape, actor, settings, settings.reference, logits=True, entropy=False)
        found.append((*resident(actor, "actor"), *idle, *other))
    if run.critic:
        values = _values(run, run.critic)
        found.append((*resident(actor, "actor"), *resident(run.critic, "critic", loaded=True), *values))
    return (*_beside(run), *_context(), *max(found, key=total))


def _values(run: Run, critic: Model) -> tuple[Item, ...]:
    return parts.inference(run.critic_shape, critic, run.settings, critic.engine.infer, logits=False, entropy=False)


def _critic_update(run: Run, critic: Model) -> tuple[Item, ...]:
    update = parts.training(run.critic_shape, critic, run.settings, "critic")
    return (*_beside(run), *_context(), *resident(run.actor, "actor"), *update)


def _actor_update(run: Run) -> tuple[Item, ...]:
    idle = resident(run.critic, "critic") if run.critic else ()
    return (*_beside(run), *_context(), *idle, *parts.training(run.shape, run.actor, run.settings, "actor"))


def _weight_update(run: Run) -> tuple[Item, ...]:
    """The weight update, which sends one full tensor at a time through a bucket (verl bucketed_weight_transfer.py).

    FSDP1 exports a second copy of its shards; FSDP2 stages tensors from wherever they are (transformer_impl.py:977,
    get_per_tensor_param). To engines on other GPUs every trainer process sends through two buckets of the checkpoint
    engine, or holds two to pass them on (verl/checkpoint_engine/nccl_checkpoint_engine.py:159, prepare).
    """
    actor = run.actor
    first = actor.engine.strategy == "fsdp"
    items = [*_context(), *_idle_or_loaded(run, loaded=first and not actor.engine.param_offload)]
    if first:
        items.append(item("exported shards", actor.params, "FSDP1's state_dict copies them"))
    items.append(_full_tensor(run))
    if run.settings.colocated:
        items += [*_into_engine(run), *_asleep(run)]
    else:
        items.append(_exchange(run))
    return tuple(items)


def _refit(run: Run) -> tuple[Item, ...]:
    """A weight update on the GPUs of an engine alone, whose KV cache is released meanwhile if the engine sleeps.

    The tensors arrive in two buckets and reach the engine in two more (verl/checkpoint_engine/base.py:354;
    vllm_async_server.py:875, release_kv_cache).
    """
    return (*_receiver(), _full_tensor(run), _exchange(run), *_into_engine(run), *_asleep(run))


def _full_tensor(run: Run) -> Item:
    return item("full tensor", _largest(run), f"largest of the model, {run.actor.engine.model_bytes} B each")


def _largest(run: Run) -> int:
    """Bytes of the largest tensor of the policy as it is sent."""
    shape = run.shape
    experts = 2 * shape.experts * shape.expert_intermediate * shape.hidden
    return max(shape.vocab * shape.hidden, experts) * run.actor.engine.model_bytes


def _exchange(run: Run) -> Item:
    return item("checkpoint engine", 2 * run.settings.bucket, "two of its buckets")


def _into_engine(run: Run) -> tuple[Item, ...]:
    bucket = run.settings.bucket
    buckets = item("buckets", max(bucket, _largest(run)) + bucket, "the sender's and the engine's copy")
    if not run.settings.rollout.sleeps:
        return (buckets,)  # the weights are among what is awake
    return (buckets, item("engine weights", run.engine.weights, f"{run.settings.rollout.precision}, awake again"))


def copies(run: Run) -> int:
    """Bytes of CPU memory that a trainer process takes for copies of its share of the policy.

    The decoupled log-probs of `separate_async` are those of the policy at the step's start, which is kept; between
    mini-batches the newer policy is copied as well (verl/trainer/ppo/v1/trainer_separate_async.py:188). With one
    mini-batch there are two, too: the previous step's goes when that of the next is complete
    (verl/experimental/separation/engine_workers.py:137), and the newer one is copied to score responses again.
    """
    return 0 if run.settings.colocated else round(2 * run.actor.params)


def _idle_or_loaded(run: Run, *, loaded: bool) -> tuple[Item, ...]:
    critic = resident(run.critic, "critic") if run.critic else ()
    return (*resident(run.actor, "actor", loaded=loaded), *critic)


def document(found: Estimate) -> dict[str, Any]:
    """An estimate as plain data for JSON; sizes are in bytes."""
    advice = found.advice
    return {
        "gpu_bytes": found.gpu_bytes,
        "verdict": found.verdict,
        "gpus": dict(found.kinds) or None,
        "cpu_bytes": found.host,
        "peak": {"phase": found.peak.name, "bytes": found.peak.bytes, "bytes_without_padding": found.least},
        "advice": {"key": advice.key, "value": advice.value, "fits": advice.fits} if advice else None,
        "kv_cache": {"tokens": found.kv_tokens, "wanted_tokens": found.wanted_tokens, "holds_a_sequence": found.starts},
        "phases": [
            {
                "name": phase.name,
                "gpus": phase.side,
                "bytes": phase.bytes,
                "items": [{"name": part.name, "bytes": part.bytes, "formula": part.formula} for part in phase.items],
            }
            for phase in found.phases
        ],
    }


MARKS = {"fits": "✓", "tight": "!", "over": "✗"}


def summary(found: Estimate) -> list[str]:
    """The verdict, the KV cache and the advice, one line each."""
    peak = found.peak
    padding = f" ({_gib(found.least)} without padding)" if found.least < peak.bytes else ""
    size = f"{_gib(peak.bytes)}{padding} of {_gib(found.gpu_bytes)} GiB"
    lines = [
        f"{MARKS[found.verdict]} {found.verdict}: {size} a GPU, most in {peak.title}",
        f"KV cache of an engine: {found.kv_tokens:,} tokens; its batch at full length: {found.wanted_tokens:,}",
    ]
    if found.host:
        lines.append(f"CPU memory of a trainer process for copies of the policy: {_gib(found.host)} GiB")
    if not found.starts:
        lines.append("the KV cache does not hold one sequence of the longest length: vLLM would not start")
    if found.advice:
        lines.append(f"{'to fit' if found.advice.fits else 'most would help'}: {found.advice}")
    return lines


def block(found: Estimate) -> list[str]:
    """An estimate as a few lines of plain text.

    It is the summary, with the three largest items of each phase after the verdict; of two kinds of GPUs, each kind has
    its own lines.
    """
    verdict, *others = summary(found)
    if not found.kinds:
        return [verdict, *map(_phase, found.phases), *others]
    lines = [verdict]
    for side, count in found.kinds:
        phases = (phase for phase in found.phases if phase.side == side)
        lines += [f"  {side}, {counted(count, 'GPU')}:", *(f"  {_phase(phase)}" for phase in phases)]
    return [*lines, *others]


def _phase(phase: Phase) -> str:
    largest = sorted(phase.items, key=lambda part: -part.bytes)[:3]
    parts = ", ".join(f"{part.name} {_gib(part.bytes)}" for part in largest)
    return f"  {phase.name:<13} {_gib(phase.bytes):>6} GiB: {parts}"


def _gib(size: int) -> float:
    return round(size / GIB, 1)

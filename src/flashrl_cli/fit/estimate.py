"""Will a run fit: peak memory of every phase on one GPU, a verdict, and the one key that would help most.

Pure: everything comes from the composed configuration, the model's shape and the GPU's size. Formulae and their sources: docs/memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from flashrl_cli.fit import advise
from flashrl_cli.fit.phases import Phase, phases, run_of
from flashrl_cli.verl.memory_keys import TrainerSettings, settings_of

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.fit.advise import Advice
    from flashrl_cli.fit.serving import Engine
    from flashrl_cli.fit.shape import ModelShape
    from flashrl_cli.verl.compose import Tree

H100_BYTES = 81_559 << 20
"""Size to assume where no GPU can be asked: an H100 of 80 GB, as nvidia-smi gives it."""
Verdict = Literal["fits", "tight", "over"]
RANK: dict[Verdict, int] = {"fits": 0, "tight": 1, "over": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Peak memory of a run on one GPU."""

    gpu_bytes: int
    phases: tuple[Phase, ...]
    least: int
    """Bytes of the peak if no sequence is shorter than the longest, so that nothing is lost to padding."""
    kv_tokens: int
    """Tokens that one engine's KV cache holds."""
    wanted_tokens: int
    """Tokens of all sequences that an engine may run at once, at full length."""
    starts: bool
    """Whether the cache holds one sequence of `max_model_len`, without which vLLM does not start."""
    verdict: Verdict
    advice: Advice | None

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.bytes)


def estimate(
    resolved: Resolved,
    tree: Tree,
    shape: ModelShape,
    critic_shape: ModelShape | None = None,
    gpu_bytes: int = H100_BYTES,
) -> Estimate:
    """Estimate of a resolved preset and its composed configuration, on GPUs of `gpu_bytes`.

    Without `critic_shape` a critic starts from the policy. Raises ValueError for a training engine other than FSDP.
    """
    return of_settings(settings_of(resolved.spec, tree), shape, critic_shape, gpu_bytes)


def of_settings(
    settings: TrainerSettings, shape: ModelShape, critic_shape: ModelShape | None, gpu_bytes: int
) -> Estimate:
    """Estimate of a run given as settings."""

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
    )


def judge(engine: Engine, found: tuple[Phase, ...], least: int, gpu_bytes: int) -> Verdict:
    """`over` when even the `least` peak exceeds the GPU or vLLM cannot start, `tight` when padding or the margins might."""
    if not engine.starts or least > gpu_bytes:
        return "over"
    return "tight" if any(phase.at_worst > gpu_bytes for phase in found) else "fits"


def possible(settings: TrainerSettings, shape: ModelShape) -> bool:
    """Whether verl and vLLM take the numbers of GPUs: heads divide over an engine, responses over the trainers."""
    parts = settings.actor.sequence_parallel
    responses = settings.mini_batch * settings.n * parts
    return shape.heads % settings.rollout.tensor_parallel == 0 and responses % settings.world == 0


def document(found: Estimate) -> dict[str, Any]:
    """An estimate as plain data for JSON; sizes in bytes."""
    advice = found.advice
    return {
        "gpu_bytes": found.gpu_bytes,
        "verdict": found.verdict,
        "peak": {"phase": found.peak.name, "bytes": found.peak.bytes, "bytes_without_padding": found.least},
        "advice": {"key": advice.key, "value": advice.value, "fits": advice.fits} if advice else None,
        "kv_cache": {"tokens": found.kv_tokens, "wanted_tokens": found.wanted_tokens, "holds_a_sequence": found.starts},
        "phases": [
            {
                "name": phase.name,
                "bytes": phase.bytes,
                "items": [{"name": part.name, "bytes": part.bytes, "formula": part.formula} for part in phase.items],
            }
            for phase in found.phases
        ],
    }

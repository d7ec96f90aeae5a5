"""What `auto` stands for in a preset: the tokens of a forward pass, and whether activations are computed again.

The estimate of a run's memory is searched for the largest passes that fit with its margins. Recomputation is avoided
first, longer passes come second: recomputation adds a forward pass to the forward and backward pass of an update, a
third of its work (a backward pass counts as two forward passes: Kaplan et al., 2020, arXiv 2001.08361, section 2.1),
while a pass that is long enough already gains nothing by being longer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from flashrl_cli.config.layers import Origin
from flashrl_cli.memory.advise import ENOUGH_WORK, active, recomputing, updating
from flashrl_cli.memory.estimate import phases, run_of
from flashrl_cli.text import GIB
from flashrl_cli.verl.config import ROLES, Batch
from flashrl_cli.verl.overrides import AUTO

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.verl.config import TrainerSettings
    from flashrl_cli.weights.shape import ModelShape

STEP = 1024
"""Budgets are multiples of it, or one full-length sequence."""
CAP = 32_768
"""Tokens of a pass beyond which more of them bring no speed, whatever fits."""
ENOUGH = 16_384
"""Tokens of a pass that hide the exchange of weights and gradients between nodes: FSDP moves 8 bytes a parameter and
pass while 6 floating-point operations a parameter and token are computed, at 400 Tflop/s and 50 GB/s as long as the
exchange from 10,700 tokens on."""
LEAST_ENOUGH = 2048
"""The same within a node, at 300 GB/s between GPUs: 1,800 tokens."""
UNKNOWN = 4096
"""Tokens of a pass that surely fit where nothing is known of the model."""
LOGITS_ON_CPU = 1 << 30
"""Bytes of float32 logits in a pass on a CPU, whose memory is not estimated."""

RECOMPUTE = "model.recompute"
UPDATE = "algorithm.max_tokens_per_gpu"
LOG_PROBS = "rollout.log_prob_max_tokens_per_gpu"
CRITIC = "critic.max_tokens_per_gpu"


class Choice(NamedTuple):
    """The value that an `auto` or a key that was left out stands for, and why."""

    value: int | bool | str | tuple[str, ...]
    reason: str


def undecided(spec: RunSpec) -> list[str]:
    """Keys of a spec that are `auto` and have a reader."""
    found = {
        RECOMPUTE: spec.model.recompute,
        UPDATE: spec.algorithm.max_tokens_per_gpu,
        LOG_PROBS: spec.rollout.log_prob_max_tokens_per_gpu,
        CRITIC: spec.critic.max_tokens_per_gpu if spec.algorithm.advantage == "gae" else None,
    }
    return [key for key, value in found.items() if value == AUTO]


def decided(resolved: Resolved, choices: Mapping[str, Choice]) -> Resolved:
    """The preset with values for its `auto` keys, whose origins are the reasons."""
    spec = resolved.spec
    for key, choice in choices.items():
        name, _, field = key.partition(".")
        spec = spec.model_copy(update={name: getattr(spec, name).model_copy(update={field: choice.value})})
    origins = {key: Origin("derived", reason=choice.reason) for key, choice in choices.items()}
    return dataclasses.replace(resolved, spec=spec, origins={**resolved.origins, **origins})


def lines(resolved: Resolved) -> list[str]:
    """A line for each value that was chosen for a run, with its reason."""
    origins = resolved.origins
    keys = [key for key in (UPDATE, LOG_PROBS, CRITIC, RECOMPUTE) if origins[key].layer == "derived"]
    shown = {key: str(resolved.value(key)).lower() for key in keys if resolved.value(key) is not None}
    return [f"{key}={value}: {origins[key].reason}" for key, value in shown.items()]


def on_cpu(spec: RunSpec, shape: ModelShape | None) -> dict[str, Choice]:
    """Choices for a run on a CPU, whose passes are bounded by their logits."""
    fitting = min(CAP, LOGITS_ON_CPU // (4 * shape.vocab) // STEP * STEP) if shape else UNKNOWN
    why = "1 GiB of logits" if shape and fitting < CAP else "longer passes are not faster" if shape else "unknown model"
    tokens = Choice(max(fitting, spec.data.max_length), f"on a CPU: {why}")
    return dict.fromkeys((UPDATE, LOG_PROBS, CRITIC), tokens) | {
        RECOMPUTE: Choice(False, "the small models that a CPU trains fit without")
    }


def without_estimate(spec: RunSpec, why: str) -> dict[str, Choice]:
    """Choices where the memory cannot be estimated, which `why` explains: short passes, recomputed."""

    def passes(role: str) -> Choice:
        degrees = (spec.verl.get(key, spec.verl.get(f"+{key}")) for key in ROLES[role].sequence_parallel)
        share = next((degree for degree in degrees if isinstance(degree, int) and degree > 1), 1)
        tokens = max(UNKNOWN, math.ceil(spec.data.max_length / share))
        return Choice(tokens, f"{UNKNOWN:,} tokens or one full-length sequence, as {why}")

    return {
        UPDATE: passes("actor"),
        LOG_PROBS: passes("actor"),
        CRITIC: passes("critic"),
        RECOMPUTE: Choice(True, f"to be safe, as {why}"),
    }


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory of a GPU in bytes, and where that number comes from."""

    bytes: int
    source: str

    def __str__(self) -> str:
        return f"{self.bytes / GIB:.1f} GiB ({self.source})"


class Size(NamedTuple):
    """Tokens of the largest pass, why it is not larger, and whether it fits."""

    tokens: int
    reason: str
    fits: bool


def estimated(
    settings: TrainerSettings, keys: Sequence[str], shape: ModelShape, critic_shape: ModelShape | None, gpu: Gpu
) -> dict[str, Choice]:
    """Choices for the `keys` of a run with `settings`, on GPUs of a given size.

    Every other setting is kept. Passes of the policy's update, of log-probs and of the critic are not on the GPU at the
    same time, so each gets what its own phase leaves.
    """
    search = Search(shape, critic_shape, gpu)
    choices: dict[str, Choice] = {}
    if RECOMPUTE in keys:
        choices[RECOMPUTE] = search.recompute(settings, keys)
        settings = recomputing(settings, choices[RECOMPUTE].value is True)
    if UPDATE in keys:
        size = search.update(settings)
        choices[UPDATE] = Choice(size.tokens, size.reason)
        settings = updating(settings, size.tokens)
    if LOG_PROBS in keys:
        size = search.log_probs(settings)
        choices[LOG_PROBS] = Choice(size.tokens, size.reason)
        settings = scoring(settings, size.tokens)
    if CRITIC in keys and settings.critic:
        size = search.critic(settings)
        choices[CRITIC] = Choice(size.tokens, size.reason)
    return choices


@dataclass(frozen=True, slots=True)
class Search:
    """Searches the passes of a model that fit into a GPU with the margins of the estimate."""

    shape: ModelShape
    critic_shape: ModelShape | None
    gpu: Gpu

    def recompute(self, settings: TrainerSettings, keys: Sequence[str]) -> Choice:
        """Recompute only where passes that are long enough, or those that are given, do not fit without."""
        without = recomputing(settings, False)
        sizes = []
        if UPDATE in keys:
            sizes.append((self.update(without), self.enough(settings, self.shape)))
        elif not self.fits(without, "actor update"):
            return Choice(True, f"the policy's update does not fit {self.gpu} without")
        if CRITIC in keys and settings.critic:
            sizes.append((self.critic(without), self.enough(settings, self.critic_shape or self.shape)))
        elif settings.critic and not self.fits(without, "critic update"):
            return Choice(True, f"the critic's update does not fit {self.gpu} without")
        for size, enough in sizes:
            if not size.fits:
                return Choice(True, f"one full-length sequence does not fit {self.gpu} without")
            if size.tokens < enough:
                reason = f"{size.tokens:,} tokens fit {self.gpu} without, and shorter passes than {enough:,} are slower"
                return Choice(True, reason)
        return Choice(False, f"passes that are long enough fit {self.gpu} without")

    def enough(self, settings: TrainerSettings, shape: ModelShape) -> int:
        """Tokens of a pass that keep a GPU busy; at most those that a mini-batch has."""
        work = math.ceil(ENOUGH_WORK / active(shape))
        tokens = ENOUGH if settings.nodes > 1 else min(ENOUGH, max(LEAST_ENOUGH, work))
        return min(tokens, _all(settings, settings.mini_batch, settings.actor.sequence_parallel))

    def update(self, settings: TrainerSettings) -> Size:
        """The largest pass of the policy's update."""
        return self._largest(
            settings,
            settings.mini_batch,
            settings.actor.sequence_parallel,
            lambda tokens: self.fits(updating(settings, tokens), "actor update"),
        )

    def log_probs(self, settings: TrainerSettings) -> Size:
        """The largest pass of the policy and the reference policy without gradients."""
        alone = valuing(settings, settings.length) if settings.critic else settings
        return self._largest(
            settings,
            settings.scored,
            settings.actor.sequence_parallel,
            lambda tokens: self.fits(scoring(alone, tokens), "log-probs"),
        )

    def critic(self, settings: TrainerSettings) -> Size:
        """The largest pass of the critic, in its update and for its values."""
        share = settings.critic.sequence_parallel if settings.critic else 1
        alone = scoring(settings, math.ceil(settings.length / settings.actor.sequence_parallel))
        return self._largest(
            settings,
            settings.scored,
            share,
            lambda tokens: self.fits(valuing(alone, tokens), "log-probs", "critic update"),
        )

    def fits(self, settings: TrainerSettings, *names: str) -> bool:
        """Whether the phases of these names fit even if every item reaches its margin."""
        found = phases(run_of(settings, self.shape, self.critic_shape, self.gpu.bytes))
        return all(phase.at_worst <= self.gpu.bytes for phase in found if phase.name in names)

    def _largest(self, settings: TrainerSettings, prompts: int, share: int, fits: Callable[[int], bool]) -> Size:
        least = math.ceil(settings.length / share)
        whole = _all(settings, prompts, share)
        most = max(least, min(CAP, math.ceil(whole / STEP) * STEP))
        for tokens in (most, *range((most - 1) // STEP * STEP, least, -STEP), least):
            if not fits(tokens):
                continue
            if tokens < most:
                return Size(tokens, f"the most that fits {self.gpu} with all margins", fits=True)
            return Size(
                tokens, "a GPU's share of the batch has no more" if whole <= most else "more is not faster", fits=True
            )
        return Size(least, f"one full-length sequence, though it may not fit {self.gpu}", fits=False)


def _all(settings: TrainerSettings, prompts: int, share: int) -> int:
    """Tokens of a GPU if all responses to a number of prompts have full length."""
    sequences = max(1, prompts * settings.n * share // settings.world)
    return math.ceil(sequences * settings.length / share)


def scoring(settings: TrainerSettings, tokens: int) -> TrainerSettings:
    """Settings of a run whose policy and reference policy compute log-probs in passes of `tokens`."""
    actor = replace(settings.actor, infer=Batch(tokens=tokens))
    return replace(settings, actor=actor, reference=settings.reference and Batch(tokens=tokens))


def valuing(settings: TrainerSettings, tokens: int) -> TrainerSettings:
    """Settings of a run whose critic works in passes of `tokens`."""
    batch = Batch(tokens=tokens)
    return replace(settings, critic=settings.critic and replace(settings.critic, train=batch, infer=batch))

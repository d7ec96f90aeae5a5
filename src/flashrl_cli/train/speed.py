"""What slows the steps of a planned run, as far as its configuration shows it, before anything starts.

Each rule judges verl's composed keys and the estimate of memory: what saves memory and costs time is named only where
the estimate says that the run fits without it. What is certain to go wrong is refused in `verl.lint`, what does not
fit is advised on in `memory`. A run on a CPU has its own limits, and is judged by what it validates alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import paths
from flashrl_cli.data.writing import described
from flashrl_cli.text import counted
from flashrl_cli.verl import speed
from flashrl_cli.verl.config import ROLES, UPDATE, Settings, replicas
from flashrl_cli.verl.overrides import data_path
from flashrl_cli.verl.speed import SHORT, Slow

if TYPE_CHECKING:
    from flashrl_cli.memory.estimate import Estimate
    from flashrl_cli.train.launch import Launch
    from flashrl_cli.train.preflight import Memory, Validation

LEAST_SHARE = 0.5
"""Responses of validations, as a share of those that steps train on, from which validations are named."""
WANTED_SHARE = 0.1
"""Share that validations have with the interval that is advised."""
MEAN_SHARE = 0.5
"""Assumed mean length of sequences, as a share of the longest, as in the estimate of memory."""


WORTH_SHARE = 0.1
"""More of a GPU's memory that an engine must be able to take before it is advised to take it."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan as the rules see it; `estimate` is that of its memory, None if there is none."""

    settings: Settings
    estimate: Estimate | None
    validation: Validation

    @property
    def trained(self) -> list[str]:
        """Roles whose passes have gradients."""
        return ["actor", *(["critic"] if self.settings.has_critic else [])]

    @property
    def responses(self) -> int:
        """Responses of a step."""
        return self.settings.spec.data.train_batch_size * self.settings.spec.rollout.n

    @property
    def responses_an_engine(self) -> int:
        """Responses of a step that each engine samples."""
        return math.ceil(self.responses / max(1, replicas(self.settings.spec)))


def slow(launch: Launch, memory: Memory, validation: Validation) -> list[Slow]:
    """What slows the steps of a launch, the most expensive first."""
    settings = Settings(launch.resolved, launch.plan.overrides, launch.tree)
    planned = Planned(settings, memory.estimate, validation)
    rules = ON_GPUS if settings.spec.resources.platform == "cuda" else ANYWHERE
    return [found for rule in rules for found in rule(planned)]


def padding(p: Planned) -> Iterator[Slow]:
    """Sequences of very unequal lengths are padded to the longest of their micro-batch."""
    s, rows = p.settings, speed.rows_of(p.settings, UPDATE)
    if s.longest <= SHORT or rows == 1 or not speed.padded(s, p.trained):
        return
    several = "sequences" if rows is None else f"{rows} sequences"
    evidence = f"{several} of a pass are padded to the longest one, up to {s.longest:,} tokens{_typical(s)}"
    yield speed.padding(s, p.trained, evidence)


def _typical(s: Settings) -> str:
    """Length of most prompts of the only training file, if they were measured when they were prepared."""
    [first, *others] = s.spec.data.train_sets
    if others:
        return ""
    path = Path(data_path("train")(first, paths.data_root()))
    lengths = described(path).get("prompt_tokens", {})
    return f" (half of the prompts have at most {lengths['p50']})" if "p50" in lengths else ""


def attention(p: Planned) -> Iterator[Slow]:
    """Packed sequences under a mask."""
    yield from speed.attention(p.settings, p.trained)


def passes(p: Planned) -> Iterator[Slow]:
    """A mini-batch in many passes that do not fill the GPU, though larger ones fit."""
    found = p.estimate.spare.passes if p.estimate else None
    if found and speed.is_counted(p.settings):
        evidence = f"the policy update takes {found.count} of about {found.tokens:,} tokens for a mini-batch"
        yield speed.passes(p.settings, f"{evidence}, and larger ones fit")


def recomputation(p: Planned) -> Iterator[Slow]:
    """Activations are recomputed though they fit."""
    if p.estimate and p.estimate.spare.recompute:
        yield from speed.recomputation(p.settings, p.trained, "; by the estimate of memory they fit without")


def offload(p: Planned) -> Iterator[Slow]:
    """States are offloaded though they fit."""
    if p.estimate is None:
        return
    spare = p.estimate.spare
    gone = {"actor": spare.offloads, "critic": spare.critic_offloads}
    keys = [f"{ROLES[role].fsdp}.{name}" for role, names in gone.items() for name in names]
    yield from speed.offload(p.settings, keys, "; by the estimate of memory they fit on the GPU")


def graphs(p: Planned) -> Iterator[Slow]:
    """The engine runs without CUDA graphs."""
    yield from speed.graphs(p.settings)


def engine(p: Planned) -> Iterator[Slow]:
    """An engine that samples its responses in several waves: its scheduler is bounded, or its KV cache."""
    s, responses = p.settings, p.responses_an_engine
    at_once, tokens = s.spec.rollout.max_num_seqs, s.longest * MEAN_SHARE
    held = math.floor(p.estimate.kv_tokens / tokens) if p.estimate else at_once
    possible = min(responses, held, s.spec.rollout.max_num_batched_tokens)
    if possible >= 2 * at_once:
        yield speed.waves(s, responses, at_once, possible)
    larger = p.estimate.spare.engine_share if p.estimate else None
    if larger and held < responses / 2 and larger - s.spec.rollout.gpu_memory_utilization >= WORTH_SHARE:
        yield speed.cache(s, held, responses, larger)


def agents(p: Planned) -> Iterator[Slow]:
    """Few agent-loop workers for many responses."""
    yield from speed.agents(p.settings, p.responses)


def validation(p: Planned) -> Iterator[Slow]:
    """Validations that generate about as much as the steps between them."""
    found = p.validation
    if found.prompts is None or found.every is None:
        return
    generated = found.prompts * found.responses
    if generated < LEAST_SHARE * found.every * p.responses:
        return
    steps = counted(found.every, "step")
    evidence = f"each generates {generated:,} responses, and {steps} {'trains' if found.every == 1 else 'train'} on "
    evidence += f"{found.every * p.responses:,}"
    yield speed.validation(p.settings, evidence, math.ceil(generated / (WANTED_SHARE * p.responses)))


Rule = Callable[[Planned], Iterator[Slow]]
ANYWHERE: tuple[Rule, ...] = (validation,)
ON_GPUS: tuple[Rule, ...] = (
    padding,
    attention,
    passes,
    recomputation,
    offload,
    graphs,
    engine,
    agents,
    *ANYWHERE,
)

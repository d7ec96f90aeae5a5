"""Where the time of a run's steps goes, and what slows them: from verl's metrics and the plan of the run.

Everything is taken over the last steps, as a median, so that neither the start nor an interruption counts. What slows
a step is said only where it takes a share of the step, and only of keys that the plan does not set well already.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.verl import speed
from flashrl_cli.verl.config import DATA_PARALLEL, UPDATE
from flashrl_cli.verl.metrics import BESIDE_STEP, OCCASIONAL, TIMINGS
from flashrl_cli.verl.overrides import SEPARATE
from flashrl_cli.verl.speed import LOW_MFU, Recorded, Slow

if TYPE_CHECKING:
    from flashrl_cli.verl.metrics import StepMetrics

OTHER = "other"
"""The part of verl's step timer that no phase covers."""
LAST = 20
"""Number of steps, the last ones, over which medians are taken."""
TRAINER = ("log-probs", "reference", "values", "critic", "actor")
"""Phases in which the trainer computes on the batch."""
LARGE = 0.25
"""Share of a step from which a phase is worth a word."""
MOST = 0.4
"""Share of a step from which generation is."""
WASTED = 0.2
"""Share of padding from which it is named."""
LONG_TAIL = 3
"""Length of the longest response, in mean lengths, from which waiting for it is named."""
WANTED = 0.1
"""Ratio of occasional work to the steps between, with the interval that is advised."""
FEW_PASSES = 4
"""Passes of a mini-batch up to which their size is not worth changing."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds spent on something, and their share of the total."""

    what: str
    seconds: float
    share: float


def spent(seconds: Mapping[str, float]) -> list[Spent]:
    """Seconds with their shares of the sum."""
    whole = sum(seconds.values())
    return [Spent(what, one, one / whole if whole else 0.0) for what, one in seconds.items()]


def recent(history: Sequence[StepMetrics], starts: Sequence[int] = ()) -> list[StepMetrics]:
    """The last timed training steps, at most LAST.

    The first step of each attempt warms up, so it is left out unless there are no others; `starts` are the steps after
    which later attempts resumed.
    """
    timed = [metrics for metrics in history if metrics.trained and metrics["step_s"]]
    first = {metrics.step for metrics in timed[:1]} | {step + 1 for step in starts}
    return ([metrics for metrics in timed if metrics.step not in first] or timed)[-LAST:]


def step_shares(history: Sequence[StepMetrics], starts: Sequence[int] = ()) -> list[Spent]:
    """Median seconds of a step by phase, with their shares, in the order of a step; time outside the phases comes last.

    It is over the steps of `recent`. What only some steps do, validation and checkpoints, is spread over all of them.
    """
    steps = recent(history, starts)
    if not steps:
        return []
    seconds = {phase: [metrics.seconds.get(phase, 0.0) for metrics in steps] for phase in TIMINGS}
    found = {
        phase: statistics.fmean(each) if phase in OCCASIONAL else statistics.median(each)
        for phase, each in seconds.items()
    }
    found[OTHER] = statistics.median(map(_outside, steps))
    return spent({phase: each for phase, each in found.items() if each})


def _outside(metrics: StepMetrics) -> float:
    """Seconds of a step that no phase covers."""
    within = sum(seconds for phase, seconds in metrics.seconds.items() if phase != BESIDE_STEP)
    return max(0.0, (metrics["step_s"] or 0.0) - within)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast the last steps of a run were, and what slowed them; None for what is not known."""

    steps: int = 0
    """Number of steps that the medians are of."""
    step_s: float | None = None
    tokens_per_s: float | None = None
    """Tokens per second and device."""
    mfu: float | None = None
    """Model FLOPs utilization of the policy update; None on a CPU, or if verl does not know the GPU or the model."""
    padding: float | None = None
    """Largest share of what the trainer computes that is padding: 0 for packed sequences."""
    response_length: float | None = None
    longest_response: float | None = None
    cut: float | None = None
    """Share of the responses that reach `data.max_response_length`; None if no plan says what that is."""
    slow: tuple[Slow, ...] = ()

    @property
    def facts(self) -> str:
        """What is known, in one line; empty if nothing is."""
        parts = (
            f"policy update at {self.mfu:.1%} of the GPU's peak arithmetic (MFU)" if self.mfu is not None else "",
            f"{self.tokens_per_s:,.0f} tokens a second and device" if self.tokens_per_s is not None else "",
            f"responses of {self.response_length:,.0f} tokens" if self.response_length is not None else "",
            f"the longest {self.longest_response:,.0f}" if self.longest_response is not None else "",
            f"{self.cut:.0%} cut at the limit" if self.cut else "",
            f"up to {self.padding:.0%} padding" if self.padding else "",
        )
        return ", ".join(filter(None, parts))

    def document(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Measured:
    """The last steps of a run as the rules see them: its keys, its preset, its metrics and the shares of a step."""

    keys: Recorded
    steps: Sequence[StepMetrics]
    shares: Mapping[str, float]

    def median(self, name: str) -> float | None:
        """Median of a metric by flashrl's name; None if no step has it."""
        known = [value for metrics in self.steps if (value := metrics[name]) is not None]
        return statistics.median(known) if known else None

    def setting(self, *names: str) -> Any:
        """A value of the preset; None if the plan has none."""
        value: Any = self.keys.plan.get("spec")
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def whole(self, *names: str) -> int:
        """A positive whole number of the preset; 1 if the plan has none."""
        value = self.setting(*names)
        return value if isinstance(value, int) and value > 0 else 1

    def share(self, *phases: str) -> float:
        """Share of a step that some phases take."""
        return sum(self.shares.get(phase, 0.0) for phase in phases)

    @property
    def on_gpus(self) -> bool:
        """Whether the run is known to be on GPUs."""
        return bool(self.setting("resources", "platform") == "cuda")

    @property
    def trained(self) -> list[str]:
        """Roles whose passes have gradients."""
        return ["actor", *(["critic"] if "critic" in self.shares else [])]

    @property
    def devices(self) -> int:
        """Trainer processes of the run."""
        return self.whole("resources", "nodes") * self.whole("resources", "gpus_per_node")

    @property
    def rollout_devices(self) -> int:
        """Devices of the run's engines: the trainer's, unless they have their own."""
        if self.setting("trainer", "mode") != SEPARATE:
            return self.devices
        return self.whole("resources", "rollout_nodes") * self.whole("resources", "rollout_gpus_per_node")

    @property
    def responses(self) -> int:
        """Responses of a step."""
        return self.whole("data", "train_batch_size") * self.whole("rollout", "n")

    @property
    def mfu(self) -> float | None:
        """MFU of the policy update, where verl can know it."""
        return self.median("mfu") or None if self.on_gpus else None

    @property
    def is_idle(self) -> bool:
        """Whether the policy update is known to leave most of the GPU's arithmetic unused."""
        return self.mfu is not None and self.mfu < LOW_MFU

    @property
    def length(self) -> float | None:
        """Mean length of the sequences in tokens, prompt and response together."""
        prompt, response = self.median("prompt_length"), self.median("response_length")
        return prompt + response if prompt is not None and response is not None else None

    @property
    def longest(self) -> float | None:
        """Bound of the longest sequence in tokens."""
        prompt, response = self.median("longest_prompt"), self.median("longest_response")
        return prompt + response if prompt is not None and response is not None else None

    @property
    def cut(self) -> float | None:
        """Share of the responses that are as long as the preset allows."""
        longest, limit = self.median("longest_response"), self.setting("data", "max_response_length")
        if longest is None or not isinstance(limit, int):
            return None
        return self.median("longest_share") if longest >= limit else 0.0

    @property
    def padding(self) -> float | None:
        """Largest share of the trainer's tokens that is padding.

        Each sequence is padded to the longest of its pass, which is at most the longest of the batch.
        """
        if not speed.padded(self.keys, self.trained) or speed.rows_of(self.keys, UPDATE) == 1:
            return 0.0
        return max(0.0, 1 - self.length / self.longest) if self.length and self.longest else None


def diagnose(history: Sequence[StepMetrics], starts: Sequence[int], plan: Mapping[str, Any]) -> Speed:
    """How fast the last steps of a run were, and what slowed them; `plan` is its newest plan, empty for none.

    Without a plan nothing is said to slow the steps, because nobody knows what can be changed.
    """
    steps = recent(history, starts)
    shares = {one.what: one.share for one in step_shares(history, starts)}
    found = Measured(Recorded(plan), steps, shares)
    known = bool(steps and plan.get("spec"))
    return Speed(
        steps=len(steps),
        step_s=found.median("step_s"),
        tokens_per_s=found.median("tokens_per_s"),
        mfu=found.mfu if known else None,
        padding=found.padding if known else None,
        response_length=found.median("response_length"),
        longest_response=found.median("longest_response"),
        cut=found.cut if known else None,
        slow=tuple(one for rule in RULES for one in rule(found)) if known else (),
    )


def arithmetic(m: Measured) -> Iterator[Slow]:
    """The policy update takes much of a step and computes little."""
    if m.is_idle and m.mfu and m.share("actor") >= LARGE:
        yield speed.arithmetic(m.share("actor"), m.mfu)


def padding(m: Measured) -> Iterator[Slow]:
    """Much of what the trainer computes is padding."""
    if not m.on_gpus or m.share(*TRAINER) < LARGE or not m.length or not m.longest or (m.padding or 0) < WASTED:
        return
    evidence = f"sequences of {m.length:,.0f} tokens are padded to up to {m.longest:,.0f}"
    yield speed.padding(m.keys, m.trained, f"{evidence}: up to {m.padding:.0%} of what the trainer computes")


def passes(m: Measured) -> Iterator[Slow]:
    """The update computes little in many passes whose size somebody gave."""
    if not m.is_idle or not m.length or m.share("actor") < LARGE or not speed.is_counted(m.keys):
        return
    rows, budget = speed.rows_of(m.keys, UPDATE), m.keys.get(UPDATE.tokens)
    responses = m.whole("algorithm", "mini_batch_size") * m.whole("rollout", "n") / m.devices
    if rows is not None:
        count, of = math.ceil(responses / rows), f"{rows} responses, about {rows * m.length:,.0f} tokens"
    else:
        count, of = math.ceil(responses * m.length / budget), f"at most {budget:,} tokens"
    if count > FEW_PASSES:
        yield speed.passes(m.keys, f"a mini-batch is updated in {count} passes of {of}")


def attention(m: Measured) -> Iterator[Slow]:
    """The update computes little under a mask."""
    if m.is_idle:
        yield from speed.attention(m.keys, m.trained)


def recomputation(m: Measured) -> Iterator[Slow]:
    """The update computes little, and part of it twice."""
    if m.is_idle and m.share("actor", "critic") >= LARGE:
        yield from speed.recomputation(m.keys, m.trained, ", unless memory needs it")


def offload(m: Measured) -> Iterator[Slow]:
    """The update computes little, and its states come from the CPU."""
    if m.is_idle and m.share("actor", "critic") >= LARGE:
        yield from speed.offload(m.keys, speed.offloading(m.keys, m.trained), ", unless memory needs it")


def generation(m: Measured) -> Iterator[Slow]:
    """Generation takes much of a step, and waits."""
    if m.share("generate") < MOST:
        return
    mean, longest = m.median("response_length"), m.median("longest_response")
    if m.on_gpus:
        yield from speed.graphs(m.keys)
        engines = m.rollout_devices // (m.whole("rollout", "tensor_parallel") * (m.keys.get(DATA_PARALLEL) or 1))
        responses, at_once = math.ceil(m.responses / max(1, engines)), m.whole("rollout", "max_num_seqs")
        possible = min(responses, m.whole("rollout", "max_num_batched_tokens"))
        if possible >= 2 * at_once > 2:
            yield speed.waves(m.keys, responses, at_once, possible)
        yield from speed.agents(m.keys, m.responses)
    if mean and longest and longest >= LONG_TAIL * mean:
        yield speed.waiting(mean, longest, m.cut or 0.0)


def occasional(m: Measured) -> Iterator[Slow]:
    """Validations or checkpoints take much of the time of the steps."""
    for phase, doing, key, cause in (
        ("validate", "validating", speed.VALIDATE, speed.validation),
        ("save", "saving", speed.SAVE, speed.checkpoints),
    ):
        share, every = m.share(phase), m.keys.get(key)
        if share < LARGE or not isinstance(every, int) or every < 1:
            continue
        evidence = f"{share:.0%} of the time goes into {doing} every {'step' if every == 1 else f'{every} steps'}"
        ratio = share / max(1 - share, 1e-3)
        yield cause(m.keys, evidence, math.ceil(every * ratio / WANTED))


Rule = Callable[[Measured], Iterator[Slow]]
RULES: tuple[Rule, ...] = (
    arithmetic,
    padding,
    passes,
    attention,
    recomputation,
    offload,
    generation,
    occasional,
)

"""Mismatch advice: how far rollout and trainer differ, what the TIS cap does about it, and whether to change the cap.

The correction multiplies each token's gradient term by the importance weight w = min(r, cap), r = p_train / p_rollout.
Two properties follow from the moments of the ratios for any gradient:

- Bias. The mean of r - w, the weight above the cap, times the largest term bounds what truncation takes from the
  gradient (E. L. Ionides, Truncated Importance Sampling, JCGS 17 (2008) 295). Without correction it is the mean of |r -
  1|.
- Noise. Terms that are independent of their ratio have their noise multiplied by the mean of w²; a single token by at
  most cap². A ratio of 16 counts 256-fold untruncated, 64-fold at cap 8, 4-fold at cap 2 (F. Yao et al., Your Efficient
  RL Framework Secretly Brings You Off-Policy RL Training, 2025).

Noise averages out over tokens and steps, but bias does not. A cap is therefore right where the weight that it cuts is
small, and a smaller cap that cuts nothing is free insurance. The thresholds for "small" are defined in this module.

verl logs moments of the ratios, not the ratios themselves (`verl.metrics.NAMES` defines each metric). `pool` weights
the moments of several steps by their tokens, which gives the moments over all their tokens together. What moments do
not determine is bounded: every bound here holds for any distribution that has these moments.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashrl_cli.verl.metrics import AT, ENOUGH, FRESH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from flashrl_cli.config.spec import CorrectionKind
    from flashrl_cli.verl.metrics import StepMetrics


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and mean square of a quantity that is not negative."""

    mean: float
    square: float

    @property
    def variance(self) -> float:
        """Variance: the mean square minus the square of the mean."""
        return max(0.0, self.square - self.mean**2)

    @property
    def effective(self) -> float:
        """Effective sample size as a share of the samples, (mean)² / mean square: L. Kish, Survey Sampling, 1965."""
        return self.mean**2 / self.square if self.square > 0 else 0.0

    def excess(self, cap: float) -> float:
        """Upper bound of the mean of max(0, x - cap): H. Scarf, A min-max solution of an inventory problem, 1958."""
        if 2 * self.mean * cap < self.square:
            return self.mean - cap * self.mean**2 / self.square
        distance = cap - self.mean
        return (math.hypot(distance, math.sqrt(self.variance)) - distance) / 2

    def share_above(self, cap: float) -> float:
        """Upper bound of the share above `cap` > 0: Cantelli's inequality above the mean, and Markov's."""
        cantelli = self.variance / (self.variance + (cap - self.mean) ** 2) if cap > self.mean else 1.0
        return min(1.0, self.mean / cap, cantelli)


@dataclass(frozen=True, slots=True)
class Weights:
    """Token weights w = min(r, cap), as they were applied in training."""

    moments: Moments
    largest: float
    above: float
    """Share of tokens with r > cap."""
    worst: float
    """Smallest effective sample size of any step, as a share of its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Ratios of trainer to rollout probabilities over the tokens of the steps from `first` to `last`."""

    first: int
    last: int
    kl: float
    """Mean of -ln r, in nats per token."""
    k3: float
    """Mean of r - ln r - 1, in nats per token: an estimate of the same KL that is never negative."""
    ratios: Moments
    weights: Weights | None
    """None where verl logged no weights, that is, without TIS."""
    prob_diff: float | None
    prob_diff_max: float | None
    length: float | None
    """Mean length of a response, in tokens."""
    tokens: float | None
    """Number of response tokens in all steps together."""

    @property
    def cut(self) -> float | None:
        """Weight above the cap: mean of r - w. None without weights."""
        if self.weights is None:
            return None
        return max(0.0, self.ratios.mean - self.weights.moments.mean) if self.weights.above else 0.0

    @property
    def deviation(self) -> float:
        """Upper bound of the mean of |r - 1|: by Cauchy and Schwarz from the second moment, by Pinsker from the KL.

        Pinsker's inequality is used in a form that does not require a mean of 1, from (r - 1)² ≤ (4r + 2)/3 · (r - ln r
        - 1).
        """
        mean, square = self.ratios.mean, self.ratios.square
        return min(mean + 1, math.sqrt(max(0.0, min(square - 2 * mean + 1, (4 * mean + 2) / 3 * self.k3))))

    @property
    def mean_error(self) -> float | None:
        """Standard error of the ratios' mean with tokens taken as independent; None if their number is not known."""
        return math.sqrt(self.ratios.variance / self.tokens) if self.tokens else None

    def cut_at(self, cap: float) -> tuple[float, float]:
        """Lower and upper bound of the weight above another `cap`."""
        most = min(self.ratios.mean, self.ratios.excess(cap))
        if self.weights is None or self.cut is None:
            return 0.0, most
        weights, step = self.weights.moments, self.weights.largest - cap
        if step <= 0:  # a larger cap; where nothing is cut, the largest weight is the largest ratio
            return max(0.0, self.cut + step * self.weights.above), min(self.cut, most)
        least = self.cut + step * self.weights.above
        return least, max(least, min(most, self.cut + weights.excess(cap)))

    def square_at(self, cap: float) -> float:
        """Upper bound of the weights' mean square under another `cap`, the factor on a gradient's noise."""
        most = min(self.ratios.square, cap * self.ratios.mean)
        if self.weights is None:
            return most
        given_back = max(0.0, (self.cut or 0.0) - self.cut_at(cap)[0])
        return min(most, self.weights.moments.square + (cap + self.weights.largest) * given_back)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """Rollout against trainer over the tokens of one staleness in some steps.

    `staleness` is None for tokens that were scored again with the weights that sampled them. The other values are those
    of `verl.metrics.FIGURES`, over all of these tokens; None without weights.
    """

    staleness: int | None
    tokens: int
    share: float
    kl: float
    kl_k3: float
    weight_mean: float | None
    effective: float | None
    truncated: float | None


def by_staleness(steps: Sequence[StepMetrics]) -> list[Stale]:
    """The tokens of `steps` by staleness, in order, those that were scored again last; empty in mode `sync`."""
    numbers = sorted({number for step in steps for number in step.stalenesses})
    total = math.fsum(step[f"tokens{AT}{number}"] or 0 for step in steps for number in step.stalenesses)
    return [one for number in (*numbers, None) if (one := _stale(steps, number, total))]


def _stale(steps: Sequence[StepMetrics], number: int | None, total: float) -> Stale | None:
    at = f"{AT}{FRESH if number is None else number}"
    known = [(tokens, step) for step in steps if (tokens := step[f"tokens{at}"]) and step[f"kl_k3{at}"] is not None]
    tokens = math.fsum(count for count, _ in known)
    if not tokens:
        return None

    def average(values: Iterable[float | None]) -> float | None:
        listed = _all(values)
        return math.fsum(n * v for (n, _), v in zip(known, listed, strict=True)) / tokens if listed else None

    kl, k3, mean, above = (
        average(step[f"{name}{at}"] for _, step in known) for name in ("kl", "kl_k3", "weight_mean", "truncated")
    )
    square = average(_square(step, at) for _, step in known)
    return Stale(
        staleness=number,
        tokens=round(tokens),
        share=tokens / total if total else 0.0,
        kl=kl or 0.0,
        kl_k3=k3 or 0.0,
        weight_mean=mean,
        effective=mean**2 / square if mean is not None and square else None,
        truncated=above,
    )


def _square(step: StepMetrics, at: str) -> float | None:
    """Mean square of the weights at a staleness."""
    mean, effective = step[f"weight_mean{at}"], step[f"effective{at}"]
    return mean**2 / effective if mean is not None and effective else None


def usable_ratios(step: StepMetrics) -> bool:
    """Whether a step logged the moments of the ratios.

    A batch with an infinite ratio did not: verl logs infinity as null.
    """
    return None not in (step["kl"], step["kl_k3"], step["chi2"])


def pool(steps: Sequence[StepMetrics]) -> Ratios:
    """The ratios of all tokens of `steps`; at least one step, all of them usable."""
    kl, k3, chi2 = (_mean(steps, name) or 0.0 for name in ("kl", "kl_k3", "chi2"))
    lengths = _all(step["response_length"] for step in steps)
    tokens = _all(map(_response_tokens, steps))
    return Ratios(
        first=steps[0].step,
        last=steps[-1].step,
        kl=kl,
        k3=k3,
        ratios=Moments(1 + k3 - kl, 1 + chi2),
        weights=_weights(steps),
        prob_diff=_mean(steps, "prob_diff"),
        prob_diff_max=max((value for step in steps if (value := step["prob_diff_max"]) is not None), default=None),
        length=sum(lengths) / len(lengths) if lengths else None,
        tokens=sum(tokens) if tokens else None,
    )


def _weights(steps: Sequence[StepMetrics]) -> Weights | None:
    mean, above = _mean(steps, "weight_mean"), _mean(steps, "truncated")
    largest, effective = (_all(step[name] for step in steps) for name in ("weight_max", "effective"))
    square = _mean(steps, "weight_mean", "weight_std")
    if mean is None or square is None or above is None or not largest or not effective:
        return None
    return Weights(Moments(mean, square), max(largest), above, min(effective))


def _mean(steps: Sequence[StepMetrics], name: str, deviation: str | None = None) -> float | None:
    """Mean of a metric over the tokens of `steps` (its mean square if the name of its deviation is given).

    None where a step lacks the metric.

    All steps have the same number of responses, so their tokens are proportional to the mean response length.
    """
    values = _all(step[name] for step in steps)
    deviations = _all(step[deviation] for step in steps) if deviation else None
    if values is None or (deviation and deviations is None):
        return None
    if deviations:
        values = [value**2 + spread**2 for value, spread in zip(values, deviations, strict=True)]
    lengths = _all(step["response_length"] for step in steps) or [1.0] * len(values)
    return sum(value * length for value, length in zip(values, lengths, strict=True)) / (sum(lengths) or 1.0)


def _response_tokens(step: StepMetrics) -> float | None:
    """Response tokens of a step: all its tokens minus those of the prompts."""
    counts = _all(step[name] for name in ("tokens", "response_length", "prompt_length"))
    if not counts:
        return None
    tokens, response, prompt = counts
    return tokens * response / (response + prompt) if response else 0.0


def _all(values: Iterable[float | None]) -> list[float] | None:
    """The values, or None if one of them is None."""
    found = list(values)
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else None


RECENT = 20
"""Number of last steps that are judged, because the mismatch changes as the policy does."""
CAPS = (2.0, 4.0, 8.0, 16.0)
"""Caps that are compared; 2 is verl's default, and recipes of 32B models use 8."""
NEGLIGIBLE, NOTABLE = 0.001, 0.01
"""Shares of the weight above the cap: below the first it is negligible, from the second on a larger cap is considered.
"""
ALIKE = 0.02
"""Mean of |r - 1| below which a correction has almost no effect, if no single ratio exceeds `CAPS[0]`."""
FAR = 0.05
"""KL in nats per token that healthy INT8 and FP8 runs do not exceed (`launch.guard`)."""
HALF = 0.5
"""Effective sample size (share) below which more than half of a batch is lost to its weights."""
OFF_MEAN, OFF_ERRORS = 0.02, 4.0
"""The ratios' mean is wrong if it differs from 1 by more than both: the first value, and the second one times its
standard error.
"""

_CLOSER = "Bring rollout and trainer closer: a run with `--rollout bf16` shows how much of it is quantization."

Verdict = Literal["keep", "raise", "lower", "optional", "try", "reduce", "check", "unknown"]
"""Verdicts on the cap. `optional`: TIS has almost no effect.

`try`: TIS is off and would have an effect. `reduce`: the mismatch is too large for any cap. `check`: something other
than a mismatch is wrong.
"""

SOURCES = {
    "verl": (
        "verl 0.9.1, verl/trainer/ppo/rollout_corr_helper.py:717-759, 952-1001; verl/utils/debug/metrics.py:116-119"
    ),
    "Kish": "L. Kish, Survey Sampling, 1965: effective sample size (sum w)² / sum w²; verl's over capped weights: :757",
    "Ionides": "E. L. Ionides, Truncated Importance Sampling, JCGS 17 (2008) 295: the bias is the weight above the cap",
    "Yao": "F. Yao et al., 2025, fengyao.notion.site/off-policy-rl: noise goes with the square of the weight",
    "Pinsker": "Pinsker's inequality, and Cauchy and Schwarz: mean |r - 1| from the KL and from the second moment",
    "Scarf": (
        "H. Scarf, A min-max solution of an inventory problem, 1958: the most weight above a cap, given two moments"
    ),
    "QuRL": "QuRL, arXiv 2602.13953, 2026: updates of RL are smaller than the steps of 8-bit weights",
    "mean": "mean of p/q over samples of q is the sum of p where q > 0, which is at most 1",
}
"""Sources of the rules, by the name that sentences give in brackets."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence, with the names in SOURCES of the rules that it is based on."""

    text: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Advice:
    """What the recent steps show of the mismatch between rollout and trainer, and what to do about it."""

    verdict: Verdict
    cap: float | None
    """The cap that was judged."""
    better: float | None
    """The recommended cap, if it is another one."""
    seen: Ratios | None
    findings: tuple[Finding, ...]
    stale: tuple[Stale, ...] = ()
    """The tokens by staleness, of the same steps; empty in mode `sync`."""

    @property
    def lines(self) -> list[str]:
        """The advice as text: sentences, each with the sources of its rule in brackets."""
        return [f"{one.text} [{', '.join(one.sources)}]" if one.sources else one.text for one in self.findings]

    def document(self) -> dict[str, Any]:
        """The advice as plain data: verdict, pooled values, sentences, and the sources in full."""
        used = {source for one in self.findings for source in one.sources}
        return {
            "verdict": self.verdict,
            "cap": self.cap,
            "better_cap": self.better,
            "values": asdict(self.seen) | {"cut_weight": self.seen.cut} if self.seen else None,
            "findings": [asdict(one) for one in self.findings],
            **({"by_staleness": [asdict(one) for one in self.stale]} if self.stale else {}),
            "sources": {name: text for name, text in SOURCES.items() if name in used},
        }


def advise(steps: Sequence[StepMetrics], cap: float | None, kind: CorrectionKind = "tis") -> Advice:
    """Judge the recent ones of `steps`, which one plan trained with weights at `cap` (None: off, or not known).

    A cap is judged of TIS only; of another `kind` of weights the advice says what was seen.
    """
    trained = [step for step in steps if step.trained][-RECENT:]
    usable = [step for step in trained if usable_ratios(step)]
    lost = sum(step["kl"] is not None for step in trained) - len(usable)
    if not usable:
        return Advice("unknown", cap, None, None, tuple(_nothing(lost)))
    seen, stale = pool(usable), tuple(by_staleness(usable))
    apart = (*_distance(seen, lost), *_of_staleness(stale, by_staleness(steps), cap))
    if kind in ("icepop", "seq-tis") and seen.weights:
        return Advice("unknown", cap, None, seen, (*apart, *_of_other_weights(seen.weights, kind)), stale)
    if cap is None and seen.weights and seen.weights.above:
        cap = seen.weights.largest  # every weight that is cut is cut to the cap
    verdict, better, judged = _judge(seen, cap)
    return Advice(verdict, cap, better, seen, (*apart, *_updates(trained), *judged), stale)


def percent(share: float) -> str:
    """A share in percent with two digits (three just below 100 %)."""
    if 0 < share < 0.0001:
        return "under 0.01 %"
    if 0.95 <= share < 1:
        return f"{100 * share:.1f} %"
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def _of_other_weights(weights: Weights, kind: CorrectionKind) -> Iterator[Finding]:
    """Yield findings on weights that are not truncated token weights: what they leave of a batch."""
    what, of = ("IcePop", "tokens") if kind == "icepop" else ("The cap of weights of responses", "responses")
    done = "zeroes" if kind == "icepop" else "cuts"
    moments = weights.moments
    yield Finding(
        f"{what} {done} {percent(weights.above)} of the {of} from above; the mean weight is {moments.mean:.3g} instead "
        "of 1.",
        ("verl",),
    )
    yield Finding(
        f"The weights leave {percent(moments.effective)} of the tokens as effective sample size "
        f"({percent(weights.worst)} in the worst step).",
        ("Kish",),
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _nothing(lost: int) -> Iterator[Finding]:
    if lost:
        steps = "the only step" if lost == 1 else f"all {lost} steps"
        yield Finding(f"In {steps} some ratio of trainer to rollout is beyond what a float holds.", ("verl",))
    else:
        yield Finding(
            "The metrics hold nothing about rollout against trainer: verl compares them unless bypass_mode is on."
        )


def _distance(seen: Ratios, lost: int) -> Iterator[Finding]:
    """Yield findings on how far rollout and trainer differ, in nats and in probability."""
    steps = f"step {seen.first}" if seen.first == seen.last else f"steps {seen.first} to {seen.last}"
    far = f". That is far: healthy INT8 and FP8 runs stay below {FAR:g}" if seen.k3 > FAR else ""
    text = (
        f"In {steps} rollout and trainer are {_number(seen.k3)} nats a token apart (KL; mean of log-ratios "
        f"{seen.kl:.2g}){far}."
    )
    yield Finding(text, ("verl",))
    if seen.prob_diff is not None and seen.prob_diff_max is not None:
        text = (
            f"A sampled token's probability differs by {seen.prob_diff:.2g} on average and {seen.prob_diff_max:.2g} "
            "at most."
        )
        yield Finding(text, ("verl",))
    if seen.length and seen.k3 * seen.length >= 1:
        yield Finding(
            f"Over a response of {seen.length:.0f} tokens that is {_number(seen.k3 * seen.length)} nats: weights of "
            "tokens correct each choice, not which texts come up."
        )
    if lost:
        yield Finding(
            f"{lost} more of these steps {'is' if lost == 1 else 'are'} left out: some ratio there is beyond what a "
            "float holds."
        )


def _of_staleness(recent: Sequence[Stale], ever: Sequence[Stale], cap: float | None) -> Iterator[Finding]:
    """Yield findings on what of the KL is staleness, what the rollout's precision, and which keys lower either.

    `ever` is of all steps, whose tokens without staleness serve where the recent ones have none. Log-ratios are sums of
    both parts, so that their mean squares, and half of them as KL, add up if the parts are independent.
    """
    numbered = [one for one in recent if one.staleness is not None]
    if not numbered:
        return
    if [one.staleness for one in numbered] == [0]:
        yield Finding("Every token was sampled by the weights that it is weighted against: its staleness is 0.")
        return
    mean = math.fsum(one.share * (one.staleness or 0) for one in numbered)
    text = f"The tokens' staleness is {_number(mean)} on average and {numbered[-1].staleness} at most"
    own = _without_staleness(recent) or _without_staleness(ever)
    if own is None:
        yield Finding(f"{text}; none was scored by the weights that sampled it, so the rollout's own part is unknown.")
        return
    total = math.fsum(one.share * one.kl_k3 for one in numbered)
    part = max(0.0, 1 - own.kl_k3 / total) if total else 0.0
    text += (
        f": {percent(part)} of the KL comes from it, and {_number(min(own.kl_k3, total))} nats a token are the "
        f"rollout's own (precision and kernels)"
    )
    if total < ALIKE**2 / 2:
        yield Finding(f"{text}. Neither matters here.")
    elif part >= 0.5:
        lower = "a smaller trainer.prefetch, then trainer.max_staleness"
        yield Finding(f"{text}. Less staleness lowers it ({lower}), not another precision.")
    else:
        yield Finding(f"{text}. Another precision lowers it (`--rollout bf16` shows how far), not less staleness.")
    last = numbered[-1]
    if cap is not None and last.truncated is not None and own.truncated is not None and last.truncated >= NOTABLE:
        yield Finding(
            f"The cap of {cap:g} cuts {percent(own.truncated)} of the tokens without staleness and "
            f"{percent(last.truncated)} of those with {last.staleness}."
        )


def _without_staleness(stale: Sequence[Stale]) -> Stale | None:
    """The tokens of staleness 0, or else those that were scored again."""
    return next((one for one in stale if not one.staleness and one.tokens >= ENOUGH), None)


def _updates(steps: Sequence[StepMetrics]) -> Iterator[Finding]:
    """Yield a finding on what of the weight updates arrives in 8-bit weights; nothing where they were not compared."""
    shares = [[value for step in steps if (value := step[name]) is not None] for name in _CHANGED]
    if not all(shares):
        return
    codes, weights = (percent(statistics.median(each)) for each in shares)
    text = f"A step changes {codes} of the rollout's 8-bit weights and {weights} of the bf16 weights that it is sent"
    arrived, cosine = steps[-1]["arrived"], steps[-1]["update_cosine"]
    if arrived is not None:
        text += f". Of all changes since the start {percent(arrived)} arrived on average"
        text += f", and what changed has a cosine of {cosine:.2g} to them" if cosine is not None else ""
    yield Finding(f"{text}.", ("QuRL",))


_CHANGED = ("codes_changed", "weights_changed")


def _judge(seen: Ratios, cap: float | None) -> tuple[Verdict, float | None, list[Finding]]:
    if wrong := list(_wrong_weights(seen, cap)):
        return "check", None, wrong
    if seen.weights is None:
        verdict, better, findings = _without_weights(seen)
    else:
        verdict, better, why = _of_cap(seen, seen.weights, cap)
        findings = [*_effects(seen, seen.weights, cap), *why]
    if wrong := list(_wrong_mean(seen)):
        return "check", None, [*findings, *wrong]
    return verdict, better, findings


def _wrong_mean(seen: Ratios) -> Iterator[Finding]:
    mean, error = seen.ratios.mean, seen.mean_error
    if error is None or abs(mean - 1) <= max(OFF_MEAN, OFF_ERRORS * error):
        return
    cause = (
        "the rollout never samples tokens that the trainer finds likely (top_p, top_k), or the ratios that are "
        "missing are too rare to have been seen"
        if mean < 1
        else "the log-probs that the rollout reports are not those that it samples by"
    )
    yield Finding(f"The ratios' mean is {mean:.3g} and should be 1: {cause}.", ("mean",))


def _wrong_weights(seen: Ratios, cap: float | None) -> Iterator[Finding]:
    if cap is None:
        return
    if seen.weights is None:
        yield Finding(f"A cap of {cap:g} was asked for, but verl logged no weights: nothing is corrected.", ("verl",))
    elif seen.weights.largest > cap * (1 + 1e-5):
        yield Finding(
            f"The largest weight, {seen.weights.largest:.3g}, is above the cap of {cap:g}: these are no weights of "
            "tokens truncated there (verl logs a sequence's before its cap).",
            ("verl",),
        )


def _effects(seen: Ratios, weights: Weights, cap: float | None) -> Iterator[Finding]:
    """Yield findings on the effect of the weights: tokens cut, sample size left, noise."""
    cut = seen.cut or 0.0
    if weights.above and cap is not None:
        yield Finding(
            f"The cap of {cap:g} cuts {percent(weights.above)} of the tokens and {percent(cut)} of the weight: times "
            "the largest token's term, that is the most that it biases the gradient.",
            ("Ionides",),
        )
    else:
        yield Finding(f"Nothing is cut: the largest ratio is {weights.largest:.3g}.", ("verl",))
    moments, free = weights.moments, seen.ratios
    alone = "" if free.square - moments.square < 1e-3 else f", {percent(free.effective)} without a cap"
    yield Finding(
        f"The weights leave {percent(moments.effective)} of the tokens as effective sample size "
        f"({percent(weights.worst)} in the worst step){alone}.",
        ("Kish",),
    )
    alone = "" if not alone else f", without a cap by {free.square:.3g}"
    yield Finding(
        f"They multiply the gradient's noise by {moments.square:.3g}, that of one token by up to "
        f"{weights.largest**2:.3g}{alone}.",
        ("Yao",),
    )
    yield Finding(
        f"Without TIS the tokens' terms would be off by at most {percent(seen.deviation)} on average.", ("Pinsker",)
    )


def _of_cap(seen: Ratios, weights: Weights, cap: float | None) -> tuple[Verdict, float | None, list[Finding]]:
    """Whether the cap fits: at most half a batch is lost, little is cut, and the cap is no larger than necessary."""
    cut, noisy = seen.cut or 0.0, weights.moments.effective < HALF
    if cap is not None and cut >= NOTABLE and not noisy:
        return _raise(seen, weights, cap)
    if not weights.above and weights.largest <= CAPS[0] and seen.deviation < ALIKE:
        return "optional", None, [Finding("TIS changes next to nothing here: off would do as well, and saves nothing.")]
    enough = NOTABLE if noisy else NEGLIGIBLE
    smaller = next((c for c in CAPS if cap is not None and c < cap and seen.cut_at(c)[1] < enough), None)
    if cap is not None and smaller is not None:
        text = (
            f"A cap of {smaller:g} would do: it would cut at most {percent(seen.cut_at(smaller)[1])} of the weight, "
            f"and no token's noise would count more than {smaller**2:g}-fold (now up to {cap**2:g}-fold)."
        )
        return "lower", smaller, [Finding(text, ("Scarf", "Yao"))]
    if noisy:
        text = "No cap corrects this: the sample size only falls with a larger one, and a smaller one cuts more."
        return "reduce", None, [Finding(f"{text} {_CLOSER}", ("Kish",))]
    return "keep", None, [Finding(f"The cap fits: {_fitting(weights, cut)}.")]


def _fitting(weights: Weights, cut: float) -> str:
    if not weights.above:
        return "it cuts nothing, so a larger one changes nothing"
    if cut < NEGLIGIBLE:
        return f"a larger one would give back {percent(cut)} of the weight at most"
    return f"{percent(cut)} of the weight is little to pay for bounded noise"


def _raise(seen: Ratios, weights: Weights, cap: float) -> tuple[Verdict, float | None, list[Finding]]:
    """A notable share is cut: advise a cap twice as large, if that certainly leaves half the sample size."""
    larger = 2 * cap
    least, most = seen.cut_at(larger)
    noise = seen.square_at(larger)
    text = (
        f"A cap of {larger:g} would cut {percent(least)} to {percent(most)} of the weight instead of "
        f"{percent(seen.cut or 0)}, and multiply the noise by {noise:.3g} at most (now {weights.moments.square:.3g})"
    )
    if (seen.ratios.mean - most) ** 2 / noise >= HALF:
        return "raise", larger, [Finding(f"{text}: take it.", ("Ionides", "Scarf"))]
    text = f"{text}, which may leave less than half of the sample size"
    return "reduce", None, [Finding(f"{text}. {_CLOSER}", ("Ionides", "Scarf"))]


def _without_weights(seen: Ratios) -> tuple[Verdict, float | None, list[Finding]]:
    """TIS is off: its weights are not known, but bounds of them are."""
    deviation, free = seen.deviation, seen.ratios
    findings = [
        Finding(f"TIS is off: the tokens' terms are off by at most {percent(deviation)} on average.", ("Pinsker",)),
    ]
    if deviation < ALIKE and free.share_above(CAPS[0]) < NEGLIGIBLE:
        findings.append(
            Finding(f"No TIS does: at most {percent(free.share_above(CAPS[0]))} of the ratios exceed {CAPS[0]:g}.")
        )
        return "optional", None, findings
    cap = next((cap for cap in CAPS if seen.cut_at(cap)[1] < NOTABLE), CAPS[0])
    findings.append(
        Finding(
            f"A cap of {cap:g} would cut at most {percent(free.share_above(cap))} of the tokens and "
            f"{percent(seen.cut_at(cap)[1])} of the weight, and multiply the noise by {seen.square_at(cap):.3g} at "
            "most.",
            ("Scarf", "Yao"),
        )
    )
    findings.append(
        Finding(f"verl logs the weights only with TIS on: a few steps with `--tis {cap:g}` show what it really cuts.")
    )
    return "try", cap, findings

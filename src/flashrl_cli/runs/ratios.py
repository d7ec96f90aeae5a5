"""Importance ratios of the sampled tokens, r = p_train / p_rollout, as far as verl's metrics tell of them.

verl logs moments, not the ratios themselves; what each metric is stands in `verl.metrics.NAMES`. Moments of several steps are
pooled by their tokens, so that they are those of all their tokens together. What lies beyond the moments is bounded:
every bound here holds for any distribution that has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flashrl_cli.verl.metrics import StepMetrics


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and mean square of something that is not negative."""

    mean: float
    square: float

    @property
    def variance(self) -> float:
        """Mean square distance from the mean."""
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
    """Token weights w = min(r, cap), as they were applied."""

    moments: Moments
    largest: float
    above: float
    """Share of tokens with r > cap."""
    worst: float
    """Least effective sample size of a step, a share of its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Rollout against trainer over the tokens of the steps from `first` to `last`."""

    first: int
    last: int
    kl: float
    """Mean of -ln r, nats a token."""
    k3: float
    """Mean of r - ln r - 1, nats a token: the same KL, never negative."""
    ratios: Moments
    weights: Weights | None
    """None where verl logged no weights: without TIS."""
    prob_diff: float | None
    prob_diff_max: float | None
    length: float | None
    """Mean length of a response, tokens."""
    tokens: float | None
    """Response tokens, all together."""

    @property
    def cut(self) -> float | None:
        """Weight above the cap: mean of r - w. None without weights."""
        if self.weights is None:
            return None
        return max(0.0, self.ratios.mean - self.weights.moments.mean) if self.weights.above else 0.0

    @property
    def deviation(self) -> float:
        """Upper bound of the mean of |r - 1|: by Cauchy and Schwarz from the second moment, by Pinsker from the KL.

        Pinsker's inequality in the form that needs no mean of 1, from (r - 1)² ≤ (4r + 2)/3 · (r - ln r - 1).
        """
        mean, square = self.ratios.mean, self.ratios.square
        return min(mean + 1, math.sqrt(max(0.0, min(square - 2 * mean + 1, (4 * mean + 2) / 3 * self.k3))))

    @property
    def mean_error(self) -> float | None:
        """Standard error of the ratios' mean, tokens taken as independent; None if their number is not known."""
        return math.sqrt(self.ratios.variance / self.tokens) if self.tokens else None

    def cut_at(self, cap: float) -> tuple[float, float]:
        """Least and most that the weight above another `cap` can be."""
        most = min(self.ratios.mean, self.ratios.excess(cap))
        if self.weights is None or self.cut is None:
            return 0.0, most
        weights, step = self.weights.moments, self.weights.largest - cap
        if step <= 0:  # a larger cap; where nothing is cut, the largest weight is the largest ratio
            return max(0.0, self.cut + step * self.weights.above), min(self.cut, most)
        least = self.cut + step * self.weights.above
        return least, max(least, min(most, self.cut + weights.excess(cap)))

    def square_at(self, cap: float) -> float:
        """Upper bound of the mean square of the weights under another `cap`: what they multiply a gradient's noise by."""
        most = min(self.ratios.square, cap * self.ratios.mean)
        if self.weights is None:
            return most
        given_back = max(0.0, (self.cut or 0.0) - self.cut_at(cap)[0])
        return min(most, self.weights.moments.square + (cap + self.weights.largest) * given_back)


def usable(step: StepMetrics) -> bool:
    """Whether a step tells of the ratios. A batch that is infinitely far apart does not: verl logs infinity as null."""
    return None not in (step["kl"], step["kl_k3"], step["chi2"])


def pool(steps: Sequence[StepMetrics]) -> Ratios:
    """The ratios of all tokens of `steps`, one or more, each of them usable."""
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
    """Mean of a metric over the tokens of `steps` (its mean square, if its deviation is named); None where one lacks it.

    A step has as many responses as another, so its tokens are as many as its responses are long.
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
    """Response tokens of a step: its tokens less those of the prompts."""
    counts = _all(step[name] for name in ("tokens", "response_length", "prompt_length"))
    if not counts:
        return None
    tokens, response, prompt = counts
    return tokens * response / (response + prompt) if response else 0.0


def _all(values: Iterable[float | None]) -> list[float] | None:
    """The values, or None if one of them is."""
    found = list(values)
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else None

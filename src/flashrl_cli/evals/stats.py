"""Statistics of an evaluation: accuracies with their intervals, pass@k, maj@n, and differences of accuracies.

For differences on the same questions, p-values and intervals are corrected for multiple pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from statistics import NormalDist
from typing import Any

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A proportion and the ends of its 95 % interval."""

    value: float
    lo: float
    hi: float


def wilson(p: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of the proportion `p` seen in `trials` > 0, within [0, 1] and always around `p`.

    E. B. Wilson, JASA 22 (1927) 209; recommended by R. G. Newcombe, Statistics in Medicine 17 (1998) 857, method 3.
    """
    shrink = 1 / (1 + z * z / trials)
    centre = (p + z * z / (2 * trials)) * shrink
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) * shrink
    return min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p)


def accuracy(correct: Sequence[Sequence[bool]]) -> Estimate:
    """Share of right responses, `correct[prompt][sample]`, with its 95 % interval; needs at least one response.

    Samples of one prompt are correlated and carry less information than as many prompts: Wilson's interval uses the
    effective number of trials, total / design effect (L. Kish, Survey Sampling, 1965, ch. 5), which is between the
    number of prompts and the number of responses.
    """
    total = sum(map(len, correct))
    p = sum(map(sum, correct)) / total
    trials = _effective_trials(correct, p, total)
    return Estimate(p, *wilson(p, trials))


def _effective_trials(correct: Sequence[Sequence[bool]], p: float, total: int) -> float:
    prompts = len(correct)
    if prompts in {1, total} or p in {0.0, 1.0}:
        return prompts
    between = sum((sum(samples) / len(samples) - p) ** 2 for samples in correct) / (prompts - 1)
    return min(max(p * (1 - p) * prompts / between, prompts), total) if between else total


def budgets(n: int) -> list[int]:
    """The k of pass@k that `n` responses to each question allow: 1, 2, 4, … and `n` itself."""
    return [*(1 << power for power in range((n - 1).bit_length())), n]


def pass_at(k: int, correct: Sequence[Sequence[bool]]) -> float:
    """Unbiased share of questions with at least one right response out of `k`; `correct[prompt][sample]`.

    From n ≥ k responses, c of them right, it is the mean of 1 - C(n-c, k) / C(n, k) (M. Chen et al., arXiv 2107.03374,
    eq. 1).
    """
    missed = (math.comb(len(samples) - sum(samples), k) / math.comb(len(samples), k) for samples in correct)
    return 1 - sum(missed) / len(correct)


def majority(votes: Sequence[Sequence[tuple[str | None, bool]]]) -> float:
    """Share of questions whose most frequent answer is right (maj@n).

    `votes[prompt][sample]` is an answer and whether it is right. None does not vote, and a question without votes
    counts as wrong. Numbers are equal regardless of their notation. If several answers are equally frequent, the
    question counts by the share of right ones among them, which is the expectation of a random draw.
    """
    return sum(map(_elected, votes)) / len(votes)


def _elected(votes: Sequence[tuple[str | None, bool]]) -> float:
    ballots = [(_plain(answer), is_right) for answer, is_right in votes if answer is not None]
    counts = Counter(answer for answer, _ in ballots)
    most = max(counts.values(), default=0)
    right = {answer for answer, is_right in ballots if is_right}
    tied = [answer for answer, count in counts.items() if count == most]
    return sum(answer in right for answer in tied) / len(tied) if tied else 0.0


def _plain(answer: str) -> str:
    """The normalized answer: a number without separators, dollar signs, trailing zeros; a text without spaces."""
    text = "".join(answer.split())
    try:
        return str(Decimal(text.replace(",", "").replace("$", "")).normalize())
    except InvalidOperation:
        return text


Pair = tuple[int, int]
"""Indices of two columns."""
ALPHA = 0.05
RESAMPLES = 10_000
_ROUNDING = 1e-12
_CHUNK = 4_000_000
"""Number of elements drawn at a time: 32 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Accuracy of one column minus that of another, as a share.

    `p` is the p-value of the pair alone. `adjusted` and the 95 % interval from `lo` to `hi` are corrected for all pairs
    that are compared together.
    """

    value: float
    lo: float
    hi: float
    p: float
    adjusted: float

    @property
    def significant(self) -> bool:
        """Whether the difference is significant at the 5 % level."""
        return self.adjusted < ALPHA

    def turned(self) -> Difference:
        """The difference with its sign reversed."""
        return replace(self, value=-self.value, lo=-self.hi, hi=-self.lo)


def differences(
    columns: Sequence[Sequence[float]], pairs: Sequence[Pair], *, single: bool, stepwise: bool = False
) -> list[Difference]:
    """`columns[a] - columns[b]` for each pair (a, b); `columns[one][question]` is the share of right responses.

    With `single` (one response per question, so shares are 0 or 1) it uses exact McNemar tests and Newcombe's
    intervals, at the level that holds for all pairs together (Bonferroni); `stepwise` uses the p-values of S. Holm,
    Scand. J. Stat. 6 (1979) 65, which are lower, so that an interval may contain 0 although p is below 0.05. Without
    `single` it uses a bootstrap over questions.
    """
    if not pairs:
        return []
    return _mcnemar(columns, pairs, stepwise=stepwise) if single else _bootstrap(columns, pairs)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test; `only_a` and `only_b` count the questions that are right in one alone."""
    n = only_a + only_b
    term = total = 1
    for i in range(min(only_a, only_b)):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / (1 << n))


def newcombe(both: int, only_a: int, only_b: int, neither: int, z: float) -> tuple[float, float]:
    """Confidence interval of the difference of two paired proportions, a - b.

    R. G. Newcombe, Statistics in Medicine 17 (1998) 2635, method 10: Wilson intervals of both, combined by their
    correlation.
    """
    n = both + only_a + only_b + neither
    a, b = (both + only_a) / n, (both + only_b) / n
    (lo_a, hi_a), (lo_b, hi_b) = wilson(a, n, z), wilson(b, n, z)
    phi = _phi(both, only_a, only_b, neither)
    below = _joined(a - lo_a, hi_b - b, phi)
    above = _joined(hi_a - a, b - lo_b, phi)
    return a - b - below, a - b + above


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of `ps`."""
    adjusted = [0.0] * len(ps)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = floor
    return adjusted


def _joined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))


def _phi(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Correlation (phi) of the two, with Newcombe's continuity correction."""
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    excess = float(both * neither - only_a * only_b)
    if excess > 0:
        excess = max(excess - (both + only_a + only_b + neither) / 2, 0.0)
    return excess / math.sqrt(margins) if margins else 0.0


def _mcnemar(columns: Sequence[Sequence[float]], pairs: Sequence[Pair], *, stepwise: bool) -> list[Difference]:
    import numpy as np

    right = np.array(columns, dtype=bool)
    z = NormalDist().inv_cdf(1 - ALPHA / 2 / len(pairs))
    tables = [_table(right[a], right[b]) for a, b in pairs]
    ps = [mcnemar(only_a, only_b) for _, only_a, only_b, _ in tables]
    corrected = holm(ps) if stepwise else [min(1.0, p * len(ps)) for p in ps]
    found = []
    for table, p, adjusted in zip(tables, ps, corrected, strict=True):
        lo, hi = newcombe(*table, z)
        found.append(Difference(value=(table[1] - table[2]) / sum(table), lo=lo, hi=hi, p=p, adjusted=adjusted))
    return found


def _table(a: Any, b: Any) -> tuple[int, int, int, int]:
    """Number of questions where both are right, only the first, only the second, and neither."""
    return int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum())


def _bootstrap(columns: Sequence[Sequence[float]], pairs: Sequence[Pair]) -> list[Difference]:
    """Differences by a max-T bootstrap with 10,000 resamples of the questions.

    Each resample contributes the largest |difference| / standard error among all pairs. That is single-step max-T (P.
    H. Westfall, S. S. Young, Resampling-Based Multiple Testing, 1993, 2.2), with the tails of Student's t: an interval
    excludes 0 where its adjusted p is below 0.05. With d questions that differ, no p is below the minimum of a
    sign-flip test, 2 / 2^d.
    """
    import numpy as np

    shares = np.array(columns, dtype=float)
    questions = shares.shape[1]
    drawn = _deviations(shares)
    errors = [_error(drawn, pair) for pair in pairs]
    largest = np.zeros(RESAMPLES)
    for pair, error in zip(pairs, errors, strict=True):
        np.maximum(largest, _scaled(drawn, pair, error), out=largest)
    reach = _as_t(float(np.quantile(largest, 1 - ALPHA)), questions - 1)
    found = []
    for (a, b), error in zip(pairs, errors, strict=True):
        value = float(shares[a].mean() - shares[b].mean())
        seen = _as_normal(abs(value) / error, questions - 1) if error else math.inf if value else 0.0
        least = 2.0 ** (1 - int((shares[a] != shares[b]).sum()))
        alone = max(_share(_scaled(drawn, (a, b), error), seen), least)
        adjusted = max(_share(largest, seen), least * len(pairs))
        half = reach * error if error else 3 / questions  # "rule of three": what none of n showed is below 3 / n
        lo, hi = max(value - half, -1.0), min(value + half, 1.0)
        found.append(Difference(value=value, lo=lo, hi=hi, p=min(alone, 1.0), adjusted=min(adjusted, 1.0)))
    return found


def _error(drawn: Any, pair: Pair) -> float:
    """Standard error of the difference of two means; 0 where the values differ only by rounding."""
    error = math.sqrt(float(((drawn[pair[0]] - drawn[pair[1]]) ** 2).mean()))
    return error if error > _ROUNDING else 0.0


def _scaled(drawn: Any, pair: Pair, error: float) -> Any:
    """Absolute deviation of each resample in standard errors; 0 where there is no variation."""
    return abs(drawn[pair[0]] - drawn[pair[1]]) / (error or math.inf)


def _as_normal(t: float, freedom: int) -> float:
    """The normal quantile with the same tail as Student's `t` (M. Abramowitz, I. Stegun, 26.7.8).

    An observed difference is divided by an estimated error, a resampled one by the error that it was drawn with.
    """
    return t * (1 - 1 / (4 * freedom)) / math.sqrt(1 + t * t / (2 * freedom))


def _as_t(normal: float, freedom: int) -> float:
    """The inverse of `_as_normal`; infinity where no t corresponds."""
    if not normal:
        return 0.0
    rest = (1 - 1 / (4 * freedom)) ** 2 - normal * normal / (2 * freedom)
    return normal / math.sqrt(rest) if rest > 0 else math.inf


def _share(drawn: Any, value: float) -> float:
    """Share of resamples at least as extreme as the observation, which counts as one of them (so it is never 0)."""
    return (1 + int((drawn >= value * (1 - 1e-12)).sum())) / (1 + len(drawn))


def _deviations(shares: Any) -> Any:
    """Resampled means minus the mean, [column][resample].

    They are scaled by √(n / (n - 1)), because a resample varies less than a sample (T. C. Hesterberg, The American
    Statistician 69 (2015) 371).
    """
    import numpy as np

    count, questions = shares.shape
    random = np.random.default_rng(0)
    step = max(1, _CHUNK // questions)
    parts = []
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = random.integers(questions, size=(rows, questions))
        drawn += np.arange(rows)[:, None] * questions
        weights = np.bincount(drawn.ravel(), minlength=rows * questions).reshape(rows, questions)
        parts.append((shares - shares.mean(axis=1, keepdims=True)) @ weights.T)
    stretch = math.sqrt(questions / max(questions - 1, 1))
    return np.concatenate(parts, axis=1).reshape(count, RESAMPLES) * (stretch / questions)

"""Statistics of an evaluation: an accuracy is an estimate, and its interval is shown with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

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

    Samples of one prompt are alike and tell less than as many prompts: Wilson's interval is taken at the effective
    number of trials, total / design effect (L. Kish, Survey Sampling, 1965, ch. 5), from prompts to responses.
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
    """The k of pass@k that `n` responses to each question can tell: 1, 2, 4, … and `n` itself."""
    return [*(1 << power for power in range((n - 1).bit_length())), n]


def pass_at(k: int, correct: Sequence[Sequence[bool]]) -> float:
    """Share of questions of which at least one of `k` responses is right, without bias; `correct[prompt][sample]`.

    From n ≥ k responses, c of them right: the mean of 1 - C(n-c, k) / C(n, k) (M. Chen et al., arXiv 2107.03374, eq. 1).
    """
    missed = (math.comb(len(samples) - sum(samples), k) / math.comb(len(samples), k) for samples in correct)
    return 1 - sum(missed) / len(correct)


def majority(votes: Sequence[Sequence[tuple[str | None, bool]]]) -> float:
    """Share of questions whose most frequent answer is right (maj@n); `votes[prompt][sample]` is an answer and whether it is right.

    None does not vote, and without a vote a question counts as wrong. Numbers are alike however they are written. Among answers that
    are equally frequent one is drawn: the question counts by the share of right ones.
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
    """An answer as it is counted: a number without separators, dollar signs and zeros behind its point; else without spaces."""
    text = "".join(answer.split())
    try:
        return str(Decimal(text.replace(",", "").replace("$", "")).normalize())
    except InvalidOperation:
        return text

"""Intervals against published values, and as properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.evals.stats import accuracy, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "lo", "hi"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_newcombes_table(successes: int, trials: int, lo: float, hi: float) -> None:
    """R. G. Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    assert wilson(successes / trials, trials) == pytest.approx((lo, hi), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_holds_the_proportion(counts: tuple[int, int]) -> None:
    successes, trials = counts
    p = successes / trials
    lo, hi = wilson(p, trials)
    assert 0 <= lo <= p <= hi <= 1
    assert lo < hi
    more = wilson(p, 4 * trials)
    assert more[1] - more[0] < hi - lo


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=1, max_size=40))
def test_accuracy_of_samples(correct: list[list[bool]]) -> None:
    estimate = accuracy(correct)
    flat = [one for samples in correct for one in samples]
    assert estimate.value == pytest.approx(sum(flat) / len(flat))
    assert 0 <= estimate.lo <= estimate.value <= estimate.hi <= 1
    width = estimate.hi - estimate.lo
    for trials, sign in ((len(correct), 1), (len(flat), -1)):
        lo, hi = wilson(estimate.value, trials)
        assert sign * (hi - lo) >= sign * width - 1e-12


def test_one_sample_each_is_plain_wilson() -> None:
    estimate = accuracy([[True], [False], [True], [True]])
    assert (estimate.lo, estimate.hi) == wilson(0.75, 4)


def test_samples_that_agree_count_as_one_prompt() -> None:
    estimate = accuracy([[True] * 8, [False] * 8] * 10)
    assert (estimate.lo, estimate.hi) == pytest.approx(wilson(0.5, 20))

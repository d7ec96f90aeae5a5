"""Intervals and paired tests against published values, by enumeration, by simulation, and as properties."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.evals import stats
from flashrl_cli.evals.stats import (
    Difference,
    accuracy,
    budgets,
    differences,
    holm,
    majority,
    mcnemar,
    newcombe,
    pass_at,
    wilson,
)


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


def test_samples_that_agree_count_as_one_prompt() -> None:
    for samples in (1, 8):
        estimate = accuracy([[True] * samples, [False] * samples] * 10)
        assert (estimate.lo, estimate.hi) == pytest.approx(wilson(0.5, 20))


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=5)
    )
)
def test_pass_at_k_is_the_mean_over_all_choices(correct: list[list[bool]]) -> None:
    """By enumeration: every way to draw k of a question's responses."""
    n = len(correct[0])
    for k in range(1, n + 1):
        chosen = [list(itertools.combinations(samples, k)) for samples in correct]
        shares = [sum(map(any, ways)) / len(ways) for ways in chosen]
        assert pass_at(k, correct) == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_budgets(n: int, ks: list[int]) -> None:
    assert budgets(n) == ks


def test_an_answer_that_one_response_gave_in_the_right_form_is_right() -> None:
    assert majority([[("7", False), ("7", True), ("8", False)]]) == 1.0


@given(st.lists(st.lists(st.sampled_from("abc-"), min_size=1, max_size=7), min_size=1, max_size=6))
def test_majority_is_what_drawing_among_the_winners_gives(asked: list[list[str]]) -> None:
    def elected(votes: list[str]) -> float:
        heard = [v for v in votes if v != "-"]
        winners = [v for v in set(heard) if all(heard.count(v) >= heard.count(w) for w in heard)]
        return winners.count("a") / len(winners) if winners else 0.0

    votes = [[(None if v == "-" else v, v == "a") for v in one] for one in asked]
    assert majority(votes) == pytest.approx(sum(map(elected, asked)) / len(asked))


def test_numbers_vote_alike_however_they_are_written() -> None:
    votes = [("1,000", True), ("1000.0", True), ("$1000", True), ("7", False), ("7", False)]
    assert majority([votes]) == 1.0
    assert majority([[("\\frac{1}{2}", True), ("\\frac{1} {2}", True), ("x", False)]]) == 1.0
    assert majority([[("1000", True), ("100", False), ("100", False)]]) == 0.0


Z95 = 1.959963984540054
COUNTS = st.tuples(*[st.integers(0, 40)] * 4).filter(any)


def columns(both: int, only_a: int, only_b: int, neither: int) -> list[list[float]]:
    a = [1.0] * (both + only_a) + [0.0] * (only_b + neither)
    b = [1.0] * both + [0.0] * only_a + [1.0] * only_b + [0.0] * neither
    return [a, b]


def equal_steps(steps: int, questions: int, samples: int, seed: int) -> list[list[float]]:
    """Shares of right answers of steps that are equally good, to questions that are differently hard."""
    rng = np.random.default_rng(seed)
    hard = rng.beta(0.7, 0.7, questions)
    shares: list[list[float]] = (rng.random((samples, steps, questions)) < hard).mean(axis=0).tolist()
    return shares


def test_mcnemar_counts_coins() -> None:
    """Of all ways in which the discordant questions could have fallen, those at least as uneven."""
    for only_a, only_b in itertools.product(range(6), repeat=2):
        ways = [sum(way) for way in itertools.product((0, 1), repeat=only_a + only_b)]
        uneven = sum(abs(2 * heads - (only_a + only_b)) >= abs(only_a - only_b) for heads in ways)
        assert mcnemar(only_a, only_b) == pytest.approx(float(Fraction(uneven, len(ways))))


def test_mcnemar_of_many() -> None:
    """By hand, and without overflow."""
    assert mcnemar(1, 7) == 2 * (1 + 8) / 2**8
    assert mcnemar(3000, 3000) == 1.0
    assert 0 <= mcnemar(100, 4000) < 1e-300


def test_newcombe_gives_the_published_interval() -> None:
    """Response before and after consolidation therapy, as the R package contingencytables has it (cavo_2012)."""
    assert newcombe(59, 6, 16, 80, Z95) == pytest.approx((-0.1186, -0.0046), abs=5e-5)


@given(COUNTS)
def test_newcombe_holds_the_difference(table: tuple[int, int, int, int]) -> None:
    both, only_a, only_b, neither = table
    lo, hi = newcombe(*table, Z95)
    value = (only_a - only_b) / sum(table)
    assert -1 - 1e-12 <= lo <= value + 1e-12
    assert value - 1e-12 <= hi <= 1 + 1e-12
    assert newcombe(both, only_b, only_a, neither, Z95) == pytest.approx((-hi, -lo))


def test_newcombe_covers() -> None:
    """The interval holds the true difference in 95 of 100 studies."""
    rng = random.Random(0)
    held = 0
    for _ in range(1000):
        drawn = rng.choices(range(4), [0.4, 0.2, 0.1, 0.3], k=120)
        both, only_a, only_b, neither = (drawn.count(kind) for kind in range(4))
        lo, hi = newcombe(both, only_a, only_b, neither, Z95)
        held += lo <= 0.1 <= hi
    assert 0.93 <= held / 1000 <= 0.975


def test_holm() -> None:
    """S. Holm's steps by hand: 3 · 0.01, then 2 · 0.02, then 0.04, never falling, never above 1."""
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_none_and_bonferroni(ps: list[float]) -> None:
    for p, adjusted in zip(ps, holm(ps), strict=True):
        assert p <= adjusted <= min(1.0, len(ps) * p) + 1e-12


@given(COUNTS)
def test_one_sample_each_is_mcnemar(table: tuple[int, int, int, int]) -> None:
    (found,) = differences(columns(*table), [(0, 1)], single=True)
    assert found.value == pytest.approx((table[1] - table[2]) / sum(table))
    assert found.p == found.adjusted == mcnemar(table[1], table[2])
    assert (found.lo, found.hi) == pytest.approx(newcombe(*table, Z95))


def test_more_pairs_ask_for_more() -> None:
    asked = columns(40, 25, 10, 25)
    (alone,) = differences(asked, [(0, 1)], single=True)
    several = differences([*asked, asked[1]], [(0, 1), (0, 2), (1, 2)], single=True)
    stepwise = differences([*asked, asked[1]], [(0, 1), (0, 2), (1, 2)], single=True, stepwise=True)
    assert alone.significant
    assert several[0].p == alone.p
    assert several[0].adjusted == pytest.approx(3 * alone.p)
    assert stepwise[1].adjusted <= several[1].adjusted
    assert several[0].lo < alone.lo < alone.hi < several[0].hi


def test_no_pairs() -> None:
    assert differences([[1.0]], [], single=True) == differences([[0.5]], [], single=False) == []


def test_turned() -> None:
    one = Difference(value=0.1, lo=-0.1, hi=0.3, p=0.2, adjusted=0.4)
    assert one.turned() == Difference(value=-0.1, lo=-0.3, hi=0.1, p=0.2, adjusted=0.4)


def test_bootstrap_agrees_with_the_paired_t_interval() -> None:
    """On 300 questions the two are one; 2.592 is t's 99.5 % quantile at 299, 1.968 its 97.5 %."""
    a, b = equal_steps(2, 300, 4, seed=2)
    b = [max(0.0, share - 0.25 * (n % 5 == 0)) for n, share in enumerate(b)]
    gaps = np.array(a) - np.array(b)
    error = gaps.std(ddof=1) / np.sqrt(len(gaps))
    (found,) = differences([a, b], [(0, 1)], single=False)
    assert found.value == pytest.approx(gaps.mean())
    assert found.hi - found.value == pytest.approx(1.968 * error, rel=0.04)
    assert found.value - found.lo == pytest.approx(1.968 * error, rel=0.04)
    assert found.significant == (abs(gaps.mean()) / error > 1.968)


@pytest.mark.parametrize(("samples", "questions"), [(1, 200), (4, 40)])
def test_equal_steps_are_told_apart_in_one_of_twenty_evaluations_at_most(
    samples: int, questions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all pairs of 6 equal steps; without correction it is every third evaluation."""
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    pairs = list(itertools.combinations(range(6), 2))
    studies = [
        differences(equal_steps(6, questions, samples, seed), pairs, single=samples == 1, stepwise=True)
        for seed in range(200)
    ]
    assert sum(any(d.significant for d in study) for study in studies) <= 18, "5 %, and chance of its own"
    assert sum(any(d.p < 0.05 for d in study) for study in studies) >= 40
    assert sum(all(d.lo <= 0 <= d.hi for d in study) for study in studies) >= 180


def test_tails_of_students_t() -> None:
    """Quantiles of t at 30 degrees of freedom, and those of the normal distribution with the same tails."""
    for t, normal in ((2.042, 1.960), (2.750, 2.576)):
        assert stats._as_normal(t, 30) == pytest.approx(normal, abs=0.01)
        assert stats._as_t(stats._as_normal(t, 30), 30) == pytest.approx(t)


def test_a_real_difference_is_found() -> None:
    a, b = equal_steps(2, 400, 4, seed=5)
    better = [min(1.0, share + 0.25 * (n % 3 == 0)) for n, share in enumerate(a)]
    found, equal = differences([better, b, a], [(0, 1), (1, 2)], single=False)
    assert found.significant
    assert found.lo > 0
    assert not equal.significant


def test_bootstrap_is_reproducible() -> None:
    asked = equal_steps(3, 50, 4, seed=1)
    pairs = [(0, 1), (1, 2)]
    assert differences(asked, pairs, single=False) == differences(asked, pairs, single=False)


@given(
    st.integers(2, 3).flatmap(
        lambda steps: st.lists(
            st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=steps, max_size=steps), min_size=1, max_size=12
        )
    )
)
def test_bootstrap_is_never_more_certain_than_flipped_signs(rows: list[list[float]]) -> None:
    """Few questions prove little: of d that differ no p is below 2 / 2^d; with a large p the interval has 0 in it."""
    shares = [list(column) for column in zip(*rows, strict=True)]
    pairs = list(itertools.combinations(range(len(shares)), 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 200)
        found = differences(shares, pairs, single=False)
    for (a, b), one in zip(pairs, found, strict=True):
        differ = sum(x != y for x, y in zip(shares[a], shares[b], strict=True))
        assert min(1.0, 2 / 2**differ) <= one.p <= 1
        assert one.p <= one.adjusted <= 1
        assert -1 <= one.lo <= one.value + 1e-12
        assert one.value - 1e-12 <= one.hi <= 1
        assert one.value != 0 or not one.significant


@pytest.mark.parametrize(("a", "b", "p"), [([1.0], [0.0], 1.0), ([1.0] * 5, [0.0] * 5, 0.0625), ([0.5], [0.5], 1.0)])
def test_what_does_not_vary_proves_no_more_than_its_number(a: list[float], b: list[float], p: float) -> None:
    (found,) = differences([a, b], [(0, 1)], single=False)
    assert found.p == found.adjusted == p
    assert found.lo < found.hi

"""Intervals against published values, and as properties."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.evals.stats import accuracy, budgets, majority, pass_at, wilson


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


MARKS = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=5)
)


@given(MARKS)
def test_pass_at_k_is_the_mean_over_all_choices(correct: list[list[bool]]) -> None:
    """By enumeration: every way to draw k of a question's responses."""
    n = len(correct[0])
    for k in range(1, n + 1):
        chosen = [list(itertools.combinations(samples, k)) for samples in correct]
        shares = [sum(map(any, ways)) / len(ways) for ways in chosen]
        assert pass_at(k, correct) == pytest.approx(sum(shares) / len(shares))


@given(MARKS)
def test_pass_at_k_rises_from_accuracy(correct: list[list[bool]]) -> None:
    ks = budgets(len(correct[0]))
    values = [pass_at(k, correct) for k in ks]
    assert values[0] == pytest.approx(accuracy(correct).value)
    assert values[-1] == pytest.approx(sum(map(any, correct)) / len(correct))
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_budgets(n: int, ks: list[int]) -> None:
    assert budgets(n) == ks


@pytest.mark.parametrize(
    ("votes", "share"),
    [
        ("aab", 1.0),
        ("bba", 0.0),
        ("ab", 0.5),
        ("abc", 1 / 3),
        ("abab", 0.5),
        ("bbaac", 0.5),
        ("---", 0.0),
        ("a---", 1.0),
        ("b--", 0.0),
    ],
)
def test_majority_of_one_question(votes: str, share: float) -> None:
    """The answer a is right; - is no answer, which does not vote."""
    assert majority([[(None if v == "-" else v, v == "a") for v in votes]]) == pytest.approx(share)


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


def test_with_one_sample_majority_is_accuracy() -> None:
    assert majority([[("a", True)], [("b", False)], [(None, False)]]) == pytest.approx(1 / 3)


def test_numbers_vote_alike_however_they_are_written() -> None:
    votes = [("1,000", True), ("1000.0", True), ("$1000", True), ("7", False), ("7", False)]
    assert majority([votes]) == 1.0
    assert majority([[("\\frac{1}{2}", True), ("\\frac{1} {2}", True), ("x", False)]]) == 1.0
    assert majority([[("1000", True), ("100", False), ("100", False)]]) == 0.0

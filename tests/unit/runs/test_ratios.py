"""The ratios' moments are those of all tokens, and what is said beyond them holds for the tokens themselves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.runs.mismatch import Moments, pool, usable_ratios
from flashrl_cli.verl.metrics import read_step
from tests.unit.runs import sampled
from tests.unit.runs.sampled import Batch, mean

LOGS = st.tuples(st.floats(-6, 0), st.floats(-6, 0))
BATCHES = st.lists(st.lists(st.lists(LOGS, min_size=1, max_size=6), min_size=3, max_size=3), min_size=1, max_size=3)
CAP = st.floats(1, 20)
SLACK = 1e-9


@given(BATCHES, CAP)
def test_pooled_moments_are_those_of_all_tokens(batches: list[Batch], cap: float) -> None:
    seen, r = pool(sampled.steps(batches, cap)), sampled.ratios(batches)
    w = [min(one, cap) for one in r]
    assert seen.ratios.mean == pytest.approx(mean(r))
    assert seen.ratios.square == pytest.approx(mean([one**2 for one in r]))
    assert seen.kl == pytest.approx(-mean([math.log(one) for one in r]), abs=1e-9)
    assert seen.weights
    assert seen.weights.moments.mean == pytest.approx(mean(w))
    assert seen.weights.moments.square == pytest.approx(mean([one**2 for one in w]))
    assert seen.weights.moments.effective == pytest.approx(sum(w) ** 2 / sum(one**2 for one in w) / len(w))
    assert seen.weights.above == pytest.approx(sum(one > cap for one in r) / len(r))
    assert seen.tokens == pytest.approx(len(r))


@given(BATCHES, CAP)
def test_the_weight_cut_is_exactly_what_lies_above_the_cap(batches: list[Batch], cap: float) -> None:
    seen, r = pool(sampled.steps(batches, cap)), sampled.ratios(batches)
    assert seen.cut == pytest.approx(mean([max(0.0, one - cap) for one in r]), abs=1e-8)


@given(BATCHES, CAP, CAP, st.booleans())
def test_bounds_for_another_cap_hold(batches: list[Batch], cap: float, other: float, off: bool) -> None:
    seen, r = pool(sampled.steps(batches, None if off else cap)), sampled.ratios(batches)
    least, most = seen.cut_at(other)
    assert least - 1e-7 <= mean([max(0.0, one - other) for one in r]) <= most + 1e-7
    assert mean([min(one, other) ** 2 for one in r]) <= seen.square_at(other) * (1 + SLACK) + 1e-7
    assert mean([float(one > other) for one in r]) <= seen.ratios.share_above(other) + SLACK


@given(BATCHES)
def test_the_mean_deviation_is_bounded(batches: list[Batch]) -> None:
    r = sampled.ratios(batches)
    assert mean([abs(one - 1) for one in r]) <= pool(sampled.steps(batches, None)).deviation + 1e-6


@given(st.floats(0.1, 5), st.floats(0, 5), st.floats(0.1, 50))
def test_the_bound_of_the_excess_is_met_by_two_points(average: float, spread: float, cap: float) -> None:
    moments = Moments(average, average**2 + spread**2)
    spread = math.sqrt(moments.square - average**2)  # what a float keeps of a small one
    if 2 * average * cap < moments.square:
        high, share = moments.square / average, average**2 / moments.square  # and zero
    else:
        distance = math.hypot(cap - average, spread)
        high = cap + distance
        share = (1 - (cap - average) / distance) / 2 if distance else 0.0
    assert moments.excess(cap) == pytest.approx(share * (high - cap), abs=1e-9)


def test_without_tis_there_are_no_weights() -> None:
    seen = pool(sampled.steps([sampled.sample(0.1, responses=2)], None))
    assert (seen.weights, seen.cut) == (None, None)


def test_what_is_missing_is_not_known() -> None:
    data = sampled.logged(sampled.sample(0.1, responses=2), 2)
    for name in ("perf/total_num_tokens", "training/rollout_probs_diff_mean", "training/rollout_probs_diff_max"):
        del data[name]
    seen = pool([read_step(1, data)])
    assert (seen.tokens, seen.mean_error, seen.prob_diff, seen.prob_diff_max) == (None, None, None, None)
    data["response_length/mean"] = None
    assert pool([read_step(1, data)]).length is None


def test_no_response_at_all_divides_nothing_by_zero() -> None:
    data = sampled.logged(sampled.sample(0.1, responses=2), 2) | {"response_length/mean": 0.0}
    seen = pool([read_step(1, data)])
    assert (seen.tokens, seen.mean_error) == (0.0, None)
    assert Moments(0.0, 0.0).effective == 0


@pytest.mark.parametrize("name", ["rollout_corr/kl", "rollout_corr/k3_kl", "rollout_corr/chi2_token"])
def test_a_step_without_a_finite_value_is_of_no_use(name: str) -> None:
    data = sampled.logged(sampled.sample(0.1, responses=1), 2)
    assert usable_ratios(read_step(1, data))
    assert not usable_ratios(read_step(1, data | {name: None}))

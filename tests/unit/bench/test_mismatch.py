"""Statistics of a mismatch against values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.bench.scorer import knows_nothing, statistics

LOG2 = math.log(2)
# ratios p_train / p_rollout: 1, 2, 1/2 in a first sequence, 4 in a second
ROLLOUT = [-1.0, -2.0, -1.0, -3.0]
TRAIN = [-1.0, -2.0 + LOG2, -1.0 - LOG2, -3.0 + 2 * LOG2]


def by_hand() -> dict[str, Any]:
    return statistics(ROLLOUT, TRAIN, [3, 1])


def test_differences_of_log_probs() -> None:
    found = by_hand()["abs_difference"]
    assert found["mean"] == pytest.approx((0 + 1 + 1 + 2) * LOG2 / 4)
    assert found["max"] == pytest.approx(2 * LOG2)
    # between the third and the fourth of 0, 1, 1, 2 (times log 2), at 0.99 * 3 = 2.97 of the way
    assert found["p99"] == pytest.approx((1 + 0.97) * LOG2)


def test_both_estimators_of_the_kl() -> None:
    found = by_hand()["kl"]
    assert found["k1"] == pytest.approx(-(0 + 1 - 1 + 2) * LOG2 / 4)
    assert found["k3"] == pytest.approx(((1 + 2 + 0.5 + 4) - 4 - 2 * LOG2) / 4)


def test_weights_of_tokens() -> None:
    found = by_hand()["token_weights"]
    assert (found["mean"], found["min"], found["max"]) == (
        pytest.approx(7.5 / 4),
        pytest.approx(0.5),
        pytest.approx(4),
    )
    assert (found["above_2"], found["above_8"]) == (0.25, 0.0)
    assert found["effective"] == pytest.approx(7.5**2 / (1 + 4 + 0.25 + 16) / 4)


def test_weights_of_sequences_are_products_and_geometric_means() -> None:
    found = by_hand()
    assert found["sequences"] == 2
    assert found["sequence_weights"]["mean"] == pytest.approx((1 * 2 * 0.5 + 4) / 2)
    assert found["sequence_weights"]["effective"] == pytest.approx((1 + 4) ** 2 / (1 + 16) / 2)
    assert found["sequence_geometric"]["mean"] == pytest.approx((1 + 4) / 2)
    long = statistics([-1.0] * 4, [-1.0 + LOG2] * 4, [4])
    assert long["sequence_weights"]["max"] == pytest.approx(16)
    assert long["sequence_geometric"]["max"] == pytest.approx(2)


def test_the_same_on_both_sides_is_no_mismatch() -> None:
    found = statistics(ROLLOUT, ROLLOUT, [4])
    assert found["abs_difference"] == {"mean": 0, "p99": 0, "max": 0}
    assert (found["kl"]["k1"], found["kl"]["k3"], found["token_weights"]["effective"]) == (0, 0, 1)


def test_large_ratios_do_not_overflow_the_effective_size() -> None:
    assert statistics([-600.0, 0.0], [0.0, 0.0], [2])["token_weights"]["effective"] == pytest.approx(0.5)


def test_a_sequence_that_is_far_off_stays_finite() -> None:
    found = statistics([-30.0] * 40, [0.0] * 40, [40])
    assert math.isfinite(found["sequence_weights"]["mean"])
    assert found["sequence_weights"]["above_8"] == 1.0


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=30))
def test_k3_is_never_negative_and_shares_are_shares(pairs: list[tuple[float, float]]) -> None:
    found = statistics([a for a, _ in pairs], [b for _, b in pairs], [len(pairs)])
    assert found["kl"]["k3"] >= 0
    assert 0 < found["token_weights"]["effective"] <= 1 + 1e-9
    assert 0 <= found["token_weights"]["above_8"] <= found["token_weights"]["above_2"] <= 1


@pytest.mark.parametrize(
    ("rollout", "train", "lengths"),
    [([-1.0], [-1.0, -2.0], [1]), ([-1.0, -2.0], [-1.0, -2.0], [1]), ([-1.0], [-1.0], [1, 0]), ([], [], [])],
)
def test_what_does_not_fit_is_refused(rollout: list[float], train: list[float], lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        statistics(rollout, train, lengths)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_no_log_prob_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        statistics([-1.0, value], [-1.0, -1.0], [2])


def test_a_policy_with_random_weights_is_told() -> None:
    assert knows_nothing(0.95 * math.log(259), 259)
    assert not knows_nothing(0.5 * math.log(259), 259)

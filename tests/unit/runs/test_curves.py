"""Metrics become curves: by flashrl's names and verl's, with holes, over attempts, smoothed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.runs import curves
from flashrl_cli.runs.curves import curve, smoothed
from flashrl_cli.runs.metrics import read_run_metrics
from flashrl_cli.verl.metrics import NAMES, StepMetrics, read_step
from tests.unit.runs.on_disk import a_run, log, training, validation

finite = st.floats(-1e6, 1e6)


def history(*rewards: float | None) -> list[StepMetrics]:
    return [read_step(step, training(reward)) for step, reward in enumerate(rewards, 1)]


def test_a_curve_has_a_point_a_step() -> None:
    found = curve("r", history(0.1, 0.2), "reward")
    assert found
    assert (found.run, found.metric, found.steps, found.values) == ("r", "reward", (1, 2), (0.1, 0.2))
    assert found.every_step


@pytest.mark.parametrize("name", ["reward", NAMES["reward"]])
def test_verls_name_is_as_good_as_flashrls(name: str) -> None:
    found = curve("r", history(0.1), name)
    assert found
    assert found.values == (0.1,)


def test_seconds_of_a_phase() -> None:
    found = curve("r", [read_step(1, training(seconds_actor=2.5))], "seconds.actor")
    assert found
    assert found.values == (2.5,)


def test_nan_infinity_and_lost_steps_break_the_line() -> None:
    steps = [read_step(n, training(value)) for n, value in ((1, 0.1), (2, None), (3, math.inf), (6, 0.6))]
    found = curve("r", steps, "reward")
    assert found
    assert found.steps == (1, 2, 3, 4, 5, 6)
    assert found.values == (0.1, None, None, None, None, 0.6)


def test_what_is_measured_now_and_then_has_only_those_points_and_is_not_smoothed() -> None:
    steps = [
        read_step(0, validation(0.1)),
        read_step(1, training()),
        read_step(2, {**training(), **validation(0.5)}),
        read_step(4, {**training(), **validation(0.9)}),
    ]
    found = curve("r", steps, "accuracy")
    assert found
    assert (found.steps, found.values) == ((0, 2, 4), (0.1, 0.5, 0.9))
    assert found.smoothed(0.9) == [0.1, 0.5, 0.9]
    assert not found.every_step


def test_no_value_is_no_curve() -> None:
    assert curve("r", history(None, None), "reward") is None
    assert curve("r", history(0.1), "accuracy") is None
    assert curve("r", [], "reward") is None


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([], ()),
        ([[1, 2, 3]], ()),
        ([[1, 2, 3], [3, 4]], (2,)),
        ([[1, 2, 3], [], [4]], (3,)),
        ([[1, 2, 3], [4, 5], [3, 4]], (2,)),
        ([[1, 2, 3], [4], [4, 5]], (3,)),
        ([[1, 2], [3], [4]], (2, 3)),
        ([[1, 2], [1, 2, 3]], ()),
        ([[101], [102]], (101,)),
    ],
)
def test_starts_are_where_later_attempts_went_on(attempts: list[list[int]], expected: tuple[int, ...]) -> None:
    run = a_run()
    for number, steps in enumerate(attempts, 1):
        log(run, number, {step: training() for step in steps})
    assert read_run_metrics(run, None).resumed_after == expected


def test_a_validation_is_no_start() -> None:
    run = a_run()
    log(run, 1, {0: validation(0.1), 1: training()})
    log(run, 2, {1: validation(0.2), 2: training()})
    assert read_run_metrics(run, None).resumed_after == (1,)


def test_smoothing_of_a_constant_is_the_constant_from_the_first_step() -> None:
    assert smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2, 2, 2])


def test_smoothing_is_adams() -> None:
    assert smoothed([1.0, 0.0, 4.0], 0.5) == pytest.approx([1, (0.5 * 1) / 1.5, (0.25 * 1 + 4) / 1.75])


def test_none_stays_none_and_counts_not() -> None:
    values = [1.0, None, 3.0, 5.0]
    without = smoothed([1.0, 3.0, 5.0], 0.6)
    assert smoothed(values, 0.6) == [without[0], None, *without[1:]]


@given(st.lists(finite, min_size=1, max_size=50), st.floats(0, 0.999))
def test_smoothed_values_lie_within_what_was_seen(values: list[float], weight: float) -> None:
    found = smoothed(values, weight)
    for index, value in enumerate(found, 1):
        seen = values[:index]
        assert value is not None
        assert min(seen) - 1e-6 <= value <= max(seen) + 1e-6


@given(st.lists(st.none() | finite, max_size=50))
def test_no_weight_changes_nothing(values: list[float | None]) -> None:
    assert smoothed(values, 0) == values


def test_every_default_has_a_title() -> None:
    assert set(curves.DEFAULTS) <= set(curves.LABELS)
    assert curves.title("seconds.actor") == ("actor", "s")
    assert curves.title("critic/score/max") == ("critic/score/max", "")

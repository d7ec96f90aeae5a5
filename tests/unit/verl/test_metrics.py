"""verl's metrics under flashrl's names."""

from __future__ import annotations

import pytest

from flashrl_cli.verl import metrics
from flashrl_cli.verl.metrics import ACCURACY, BESIDE_STEP, METRICS, NAMES, TIMINGS, WATCHED, read_step, verl_name


def test_values_and_seconds_by_flashrls_names() -> None:
    data: dict[str, float | None] = {key: float(n) for n, key in enumerate((*NAMES.values(), *TIMINGS.values()))}
    step = read_step(7, data)
    assert step.step == 7
    assert list(step.values) == list(NAMES)
    assert [step[name] for name in NAMES] == [float(n) for n in range(len(NAMES))]
    assert list(step.seconds) == list(TIMINGS)
    assert (step.accuracy, step.lost) == (None, ())


def test_what_a_place_shows_can_be_shown_there() -> None:
    for column in (*metrics.LIVE, *metrics.SPARED, *metrics.SWEEP, METRICS["accuracy"]):
        assert column.heading
        assert column.cell(None) == "–"
        assert column.cell(1 / 3) == format(1 / 3, column.form) != str(1 / 3)
    for name in (*metrics.PLOTTED, *metrics.LEARNING_CURVES, *metrics.MISMATCH_CURVES, *metrics.MISMATCH):
        assert METRICS[name].title
    assert set(metrics.SPARED) < set(metrics.LIVE)
    assert set(WATCHED) == {"grad_norm", "loss", "kl", "reward", "prob_diff"}


def test_what_verl_did_not_log_is_none() -> None:
    step = read_step(1, {})
    assert set(step.values.values()) == {None}
    assert step.seconds == {}
    assert step.lost == ()
    assert step["no such metric"] is None


@pytest.mark.parametrize("name", NAMES)
def test_nan_loses_the_run_only_where_it_is_watched(name: str) -> None:
    step = read_step(1, {NAMES[name]: None})
    assert step[name] is None
    assert step.lost == ((name,) if name in WATCHED else ())


def test_everything_that_verl_logged_is_kept() -> None:
    data = {"critic/score/max": 1.0, "actor/entropy": None}
    assert read_step(1, data).logged == data


def test_verls_name_of_a_metric() -> None:
    assert verl_name("reward") == NAMES["reward"], "the score, not the phase of that name"
    assert verl_name("seconds.reward") == TIMINGS["reward"]
    assert verl_name("critic/score/max") == "critic/score/max"
    assert verl_name("seconds.nothing") == "seconds.nothing"
    assert BESIDE_STEP in TIMINGS


def test_zero_is_a_value() -> None:
    step = read_step(1, {NAMES["grad_norm"]: 0.0, TIMINGS["refit"]: 0.0})
    assert step.lost == ()
    assert (step["grad_norm"], step.seconds) == (0.0, {"refit": 0.0})


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("val-core/openai/gsm8k/reward/mean@1", "openai/gsm8k"),
        ("val-core/math_dapo/acc/mean@32", "math_dapo"),
        ("val-core/a/b/c/acc/mean@8", "a/b/c"),
    ],
)
def test_accuracy_of_data_sources_with_a_slash(key: str, data: str) -> None:
    found = ACCURACY.match(key)
    assert found
    assert found["data"] == data
    assert read_step(0, {key: 0.5}).accuracy == 0.5


@pytest.mark.parametrize(
    "key",
    ["val-core/math_dapo/acc/best@32/mean", "val-aux/math_dapo/acc/mean@32", "val-core/math_dapo/acc/maj@32/mean"],
)
def test_other_validation_metrics_are_no_accuracy(key: str) -> None:
    assert read_step(0, {key: 0.5}).accuracy is None


def test_accuracy_is_the_mean_over_sets_that_have_one() -> None:
    sets = {"val-core/a/acc/mean@1": 0.2, "val-core/b/acc/mean@1": 0.6, "val-core/c/acc/mean@1": None}
    assert read_step(0, sets).accuracy == pytest.approx(0.4)

"""verl's metrics under flashrl's names."""

from __future__ import annotations

import pytest

from flashrl_cli.verl import metrics
from flashrl_cli.verl.metrics import ACCURACY, BESIDE_STEP, METRICS, NAMES, TIMINGS, WATCHED, read_step, verl_name
from tests.unit.runs.on_disk import by_staleness


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
    for name in (*metrics.FIGURES, *metrics.STALENESS_CURVES):
        assert METRICS[name].title
    assert {METRICS[name].heading for name in metrics.LIVE_BY_STALENESS} == {"KL", "w mean"}
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
    assert verl_name("val-core/tiny/acc/mean@1") == "val-core/tiny/acc/mean@1"
    assert verl_name("seconds.nothing") == "seconds.nothing"
    assert BESIDE_STEP in TIMINGS


def test_metrics_by_staleness_have_the_staleness_in_their_name() -> None:
    step = read_step(3, by_staleness({0: 0.001, 2: 0.02, "fresh": 0.002}))
    assert step.stalenesses == (0, 2)
    assert (step["kl@0"], step["kl@2"], step["kl@1"], step["kl"]) == (0.001, 0.02, None, None)
    assert (step["kl@fresh"], step.fresh) == (0.002, "@0")
    assert verl_name("kl@2") in step.logged
    columns = metrics.by_staleness("kl", [step, read_step(4, by_staleness({10: 1.0}))])
    assert [one.heading for one in columns] == ["KL@0", "KL@2", "KL@10", "KL@fresh"]
    assert [step[one.name] for one in columns] == [0.001, 0.02, None, 0.002]


def test_tokens_without_staleness_are_those_of_staleness_0_or_those_scored_again() -> None:
    assert read_step(1, {"rollout_corr/kl": 1.0}).fresh == ""
    assert read_step(1, by_staleness({0: 0.1}, tokens=metrics.ENOUGH)).fresh == "@0"
    assert read_step(1, by_staleness({0: 0.1}, tokens=metrics.ENOUGH - 1)).fresh is None
    assert read_step(1, by_staleness({0: 0.1, "fresh": 0.1}, tokens=metrics.ENOUGH - 1)).fresh == "@fresh"
    assert read_step(1, by_staleness({1: 0.1, 2: 0.1})).fresh is None


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

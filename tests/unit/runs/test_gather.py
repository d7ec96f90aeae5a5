"""Curves of several runs, by the metrics that are asked for."""

from __future__ import annotations

import json
import math

import pytest

from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.runs.curves import gather
from tests.unit.runs.on_disk import a_run, an_attempt, log, training, validation, write_record


def test_a_resumes_first_validation_does_not_hide_what_the_step_logged() -> None:
    run = a_run()
    log(run, 1, {1: training(0.1), 2: training(0.2)})
    log(run, 2, {2: validation(0.7), 3: training(0.3)})
    write_record(run, [an_attempt(1), an_attempt(2, resumed_from=2)])
    found = gather([run], f"reward,accuracy,{next(iter(validation(1)))}").panels
    assert [one.values for one in found["reward"]] == [(0.1, 0.2, 0.3)]
    assert [(one.steps, one.values) for one in found["accuracy"]] == [((2,), (0.7,))]
    assert found["reward"][0].starts == (2,)


def test_defaults_are_those_that_there_are() -> None:
    run = a_run()
    log(run, 1, {1: training(entropy=None)})
    found = gather([run], None)
    assert list(found.panels) == ["reward", "response_length", "kl", "truncated", "step_s"]
    assert found.missing == ()


def test_several_runs_share_panels_and_what_lacks_is_told() -> None:
    a, b, silent = a_run("a"), a_run("b"), a_run("silent")
    log(a, 1, {1: training(0.1), 2: training(0.2)})
    log(b, 1, {1: training(0.3, kl=None)})
    found = gather([a, b, silent], "reward,kl")
    assert {metric: [one.run for one in listed] for metric, listed in found.panels.items()} == {
        "reward": ["a", "b"],
        "kl": ["a"],
    }
    assert found.missing == ("no step yet in silent", "no kl in b")


def test_metrics_are_asked_for_once_and_with_any_space() -> None:
    run = a_run()
    log(run, 1, {1: training()})
    assert list(gather([run], " kl, reward,kl,").panels) == ["kl", "reward"]


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("rewrd", "did you mean reward"),
        ("length", "response_length"),
        ("critic/score/meen", "critic/score/mean"),
        ("second.actor", "seconds.actor"),
        ("qqqqqqqq", "flashrl's names: reward"),
    ],
)
def test_an_unknown_metric_is_told_with_near_names(asked: str, hint: str) -> None:
    run = a_run()
    log(run, 1, {1: training()})
    with pytest.raises(InputError, match=asked) as caught:
        gather([run], f"reward,{asked}")
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("asked", ["", " , "])
def test_no_metric_at_all_is_told(asked: str) -> None:
    run = a_run()
    log(run, 1, {1: training()})
    with pytest.raises(InputError, match="--metric"):
        gather([run], asked)


def test_a_known_metric_that_nobody_logged_is_told_with_what_there_is() -> None:
    run = a_run()
    log(run, 1, {1: training(reward=None)})
    with pytest.raises(NothingMatched, match="no value of reward, accuracy in r") as caught:
        gather([run], "reward,accuracy")
    assert "response_length" in (caught.value.hint or "")
    assert "reward" not in (caught.value.hint or "")


def test_runs_without_a_step_are_told() -> None:
    with pytest.raises(NothingMatched, match="no step yet in a, b"):
        gather([a_run("a"), a_run("b")], None)


def test_the_document_is_json_without_nan() -> None:
    run = a_run()
    log(run, 1, {1: training(0.0), 2: training(math.nan), 3: training(1.0)})
    document = json.loads(json.dumps(gather([run], "reward").document(0.5), allow_nan=False))
    assert document["schema_version"] == 1
    assert document["smoothing"] == 0.5
    (one,) = document["curves"]
    assert (one["run"], one["metric"], one["steps"], one["values"]) == ("r", "reward", [1, 2, 3], [0, None, 1])
    assert one["smoothed"] == pytest.approx([0, None, 2 / 3])

"""A run in numbers."""

from __future__ import annotations

import pytest

from flashrl_cli.runs.store import Phase
from flashrl_cli.runs.summary import OTHER, Point, start_shares, step_shares, totals
from flashrl_cli.verl.metrics import StepMetrics, read_step
from tests.unit.runs.on_disk import Logged, a_run, an_attempt, training, validation, write_record


def steps(*logged: Logged) -> list[StepMetrics]:
    return [read_step(number, data) for number, data in enumerate(logged, 1)]


def test_numbers_of_a_run() -> None:
    run = a_run()
    attempts = [an_attempt(1, total_steps=4), an_attempt(2, total_steps=8, ended="2026-01-02T03:45:00+00:00")]
    found = totals(
        write_record(run, attempts),
        [
            read_step(0, validation(0.25)),
            *steps(
                {**training(0.1, tokens=100, tokens_per_s=10, step_s=30)},
                {**training(None, tokens=100, tokens_per_s=40, step_s=5)},
                {**training(0.7, tokens=100, tokens_per_s=50, step_s=4), **validation(0.5)},
            ),
        ],
    )
    assert (found.steps, found.total_steps) == (3, 8)
    assert found.reward == (Point(1, 0.1), Point(3, 0.7))
    assert found.accuracy == (Point(0, 0.25), Point(3, 0.5))
    assert found.running_s == 10 * 60 + 5 * 60
    assert (found.step_s, found.tokens_per_s, found.tokens) == (5, 40, 300)


def test_nothing_known_is_none() -> None:
    found = totals(None, [])
    assert found.steps == 0
    assert {found.total_steps, found.reward, found.accuracy, found.running_s, found.step_s, found.tokens} == {None}


def test_shares_of_a_step_add_up_and_validation_is_beside_the_steps_timer() -> None:
    found = step_shares(steps(training(), training(seconds_validate=6), training()))
    assert {spent.what: spent.seconds for spent in found} == {"generate": 4, "actor": 3, "validate": 3, OTHER: 3}
    assert sum(spent.share for spent in found) == pytest.approx(1)
    assert found[0].share == pytest.approx(4 / 13)


def test_the_first_step_of_an_attempt_warms_up_and_counts_only_if_alone() -> None:
    slow, fast = training(step_s=100, seconds_generate=90), training()
    (generate, *_) = step_shares(steps(slow, fast, fast, slow, fast), starts=[3])
    assert generate.seconds == 4
    (generate, *_) = step_shares(steps(slow, slow), starts=[1])
    assert generate.seconds == 90


def test_phases_longer_than_the_step_leave_no_rest() -> None:
    found = step_shares(steps(training(seconds_generate=40)))
    assert OTHER not in {spent.what for spent in found}


def test_untimed_steps_have_no_shares() -> None:
    assert step_shares([]) == []
    assert step_shares([read_step(0, validation(0.1)), *steps(training(step_s=None))]) == []


def phases(*began: str) -> tuple[Phase, ...]:
    return tuple(Phase(name=f"phase {n}", began=f"2026-01-02T03:20:{at}+00:00") for n, at in enumerate(began))


def test_a_start_ends_with_the_first_step() -> None:
    found = start_shares(an_attempt(phases=phases("00", "10", "40"), last_step=7, ended="2026-01-02T03:30:00+00:00"))
    assert [(spent.what, spent.seconds, spent.share) for spent in found] == [
        ("phase 0", 10, 0.25),
        ("phase 1", 30, 0.75),
    ]


def test_a_start_that_failed_ends_with_the_attempt() -> None:
    found = start_shares(an_attempt(phases=phases("00", "10"), ended="2026-01-02T03:20:30+00:00"))
    assert [(spent.what, spent.seconds) for spent in found] == [("phase 0", 10), ("phase 1", 20)]


def test_a_start_without_phases_or_time_has_no_shares() -> None:
    assert start_shares(an_attempt()) == []
    assert [spent.share for spent in start_shares(an_attempt(phases=phases("00", "00")))] == [0.0]


def test_a_clock_that_went_back_gives_no_negative_time() -> None:
    assert [spent.seconds for spent in start_shares(an_attempt(phases=phases("30", "10")))] == [0.0]

"""The list of runs, a run in numbers, and all that is known of it: from records, metrics and folders, whatever is
missing.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from flashrl_cli.contract import write_handshake
from flashrl_cli.runs.speed import OTHER, step_shares
from flashrl_cli.runs.store import Phase, RunRecord, find
from flashrl_cli.runs.summary import Point, Summary, row, rows, start_shares, summarize, totals
from flashrl_cli.verl.metrics import StepMetrics, read_step
from tests.unit.runs import on_disk, sampled
from tests.unit.runs.on_disk import a_run, attempt, handshake, log, make, planned, training, validation


def of(name: str) -> Summary:
    return summarize(find(name))


# the list


def test_a_row_of_a_record() -> None:
    run = make("demo", attempt(1, status="failed"), attempt(2, last_step=3, total_steps=20), checkpoints=70)
    log(run, 2, {1: {**training(0.25), **validation(0.5)}, 2: training(0.75)})
    found = row(find("demo"))
    assert (found.name, found.preset, found.state, found.step, found.total_steps) == ("demo", "demo", "done", 3, 20)
    assert (found.reward, found.accuracy, found.attempts) == (0.75, 0.5, 2)
    assert (found.changed, found.checkpoint_bytes, found.problem) == (on_disk.LATER, 70, None)
    assert found.run_bytes == sum(file.stat().st_size for file in run.root.rglob("*") if file.is_file())
    assert of("demo").row == found, "what was read already gives the same row"


def test_a_resumed_run_that_has_not_stepped_shows_what_it_reached() -> None:
    run = make("demo", attempt(1, last_step=2), attempt(2, status="running"))
    log(run, 1, {1: training(0.25), 2: training(0.5)})
    found = row(find("demo"))
    assert (found.state, found.step, found.reward) == ("running", 2, 0.5)


def test_a_run_without_a_record_is_what_plan_and_metrics_say() -> None:
    run = make("old")
    planned(run, 1, trainer={"steps": 8})
    log(run, 1, {1: training(0.5)})
    on_disk.touch(run, 1_700_000_000)
    found = row(find("old"))
    assert (found.preset, found.state, found.step, found.total_steps) == ("older", None, 1, 8)
    assert (found.reward, found.attempts, found.changed) == (0.5, 1, "2023-11-14T22:13:20+00:00")
    a_run("empty")
    found = row(find("empty"))
    assert (found.preset, found.step, found.total_steps, found.reward, found.attempts) == (None, None, None, None, 0)


def test_newest_first() -> None:
    assert rows() == []
    for name, hour in (("b", 12), ("a", 10), ("c", 11)):
        make(name, attempt(updated=f"2026-03-01T{hour}:00:00+00:00"))
    on_disk.touch(make("old"), 1_700_000_000)
    assert [one.name for one in rows()] == ["b", "c", "a", "old"]


# numbers


def steps(*logged: on_disk.Logged) -> list[StepMetrics]:
    return [read_step(number, data) for number, data in enumerate(logged, 1)]


def test_numbers_of_a_run() -> None:
    first = attempt(1, total_steps=4, started="2026-01-02T03:00:00+00:00", updated="2026-01-02T03:10:00+00:00")
    second = attempt(2, total_steps=8, started="2026-01-02T03:40:00+00:00", ended="2026-01-02T03:45:00+00:00")
    record = RunRecord(name="r", project="p", preset="x", created="", checkpoints="", attempts=(first, second))
    history = [
        read_step(0, validation(0.25)),
        *steps(
            training(0.1, tokens=100, tokens_per_s=10, step_s=30),
            training(None, tokens=100, tokens_per_s=40, step_s=5),
            {**training(0.7, tokens=100, tokens_per_s=50, step_s=4), **validation(0.5)},
        ),
    ]
    found = totals(record, history)
    assert (found.steps, found.total_steps) == (3, 8)
    assert found.reward == (Point(1, 0.1), Point(3, 0.7))
    assert found.accuracy == (Point(0, 0.25), Point(3, 0.5))
    assert found.running_s == 10 * 60 + 5 * 60
    assert (found.step_s, found.tokens_per_s, found.tokens) == (5, 40, 300)
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


def test_phases_longer_than_the_step_leave_no_rest_and_untimed_steps_have_no_shares() -> None:
    assert OTHER not in {spent.what for spent in step_shares(steps(training(seconds_generate=40)))}
    assert step_shares([]) == []
    assert step_shares([read_step(0, validation(0.1)), *steps(training(step_s=None))]) == []


@pytest.mark.parametrize(
    ("began", "fields", "spent"),
    [
        (("00", "10", "40"), {"last_step": 7, "ended": on_disk.LATER}, [("phase 0", 10, 0.25), ("phase 1", 30, 0.75)]),
        (("00", "10"), {"ended": "2026-03-01T10:00:40+00:00"}, [("phase 0", 10, 0.25), ("phase 1", 30, 0.75)]),
        ((), {}, []),
        (("00", "00"), {}, [("phase 0", 0, 0)]),
        (("30", "10"), {}, [("phase 0", 0, 0)]),
    ],
    ids=["until the first step", "until a failure", "no phase", "no time", "a clock that went back"],
)
def test_shares_of_a_start(
    began: tuple[str, ...], fields: dict[str, Any], spent: list[tuple[str, float, float]]
) -> None:
    phases = tuple(Phase(name=f"phase {n}", began=f"2026-03-01T10:00:{at}+00:00") for n, at in enumerate(began))
    found = start_shares(attempt(phases=phases, **fields))
    assert [(one.what, one.seconds, one.share) for one in found] == spent


# in full


def test_attempts_with_how_long_they_took_and_how_they_ended() -> None:
    failed = attempt(1, status="failed", ended=on_disk.LATER, exit_code=1, error="no memory", hint="less", last_step=2)
    lost = attempt(2, status="running", resumed_from=2, **on_disk.GONE)
    make("demo", failed, lost, attempt(3, status="running"))
    one, two, three = of("demo").attempts
    assert (one.state, one.seconds, one.exit_code, one.error, one.hint) == ("failed", 5400, 1, "no memory", "less")
    assert (two.state, two.seconds, two.resumed_from) == ("lost", 5400, 2)
    assert (three.state, (three.seconds or 0) > 5400) == ("running", True)


def test_attempts_without_a_record_are_what_their_folders_hold() -> None:
    run = make("old")
    log(run, 1, {1: training(), 2: training()})
    run.attempt(2).root.mkdir()
    assert [(one.number, one.state, one.last_step) for one in of("old").attempts] == [(1, None, 2), (2, None, None)]


def test_history_phases_and_what_was_set_aside_are_those_of_all_attempts() -> None:
    began = Phase(name="starting Ray", began=on_disk.THEN), Phase(name="sampling responses", began=on_disk.LATER)
    run = make("demo", attempt(1), attempt(2, resumed_from=1, phases=began, set_aside=("global_step_2: torn",)))
    log(run, 1, {1: training(0.1), 2: training(0.2)})
    log(run, 2, {4: training(0.4, step_s=80.0), 5: training(0.5, step_s=8.0)})
    found = of("demo")
    assert [(step.step, step["reward"]) for step in found.metrics.history] == [(1, 0.1), (4, 0.4), (5, 0.5)]
    assert found.metrics.missing == [2, 3]
    assert found.set_aside == ["global_step_2: torn"]
    assert [(one.what, one.seconds) for one in found.start] == [("starting Ray", 5400)]
    assert {one.what: one.seconds for one in found.step} == {"generate": 4, "actor": 3, OTHER: 1}, (
        "steps 1 and 4 warm up"
    )


def test_the_proof_is_the_records_or_the_folders() -> None:
    make("demo", attempt(1, proof=(asdict(handshake("fp8")),)), attempt(2))
    assert [one.precision for one in of("demo").proof] == ["fp8"]
    old = make("old")
    write_handshake(old.attempt(1).plugins, handshake())
    assert [one.precision for one in of("old").proof] == ["int8"]
    make("none", attempt(1, proof=({"another": "kind"},)))
    assert list(of("none").proof) == []
    (old.attempt(1).plugins / "x.json").write_text("{")
    assert list(of("old").proof) == []


def test_the_advice_is_on_the_newest_attempts_metrics_with_its_own_cap() -> None:
    run = make("demo", attempt(1), attempt(2))
    for number, cap, noise in ((1, 8.0, 1.0), (2, 2.0, 0.15)):
        planned(run, number, correction={"cap": cap})
        log(run, number, {1: sampled.logged(sampled.sample(noise), cap)})
    advice = of("demo").advice
    assert (advice.cap, advice.verdict) == (2.0, "keep")


def test_dropped_groups_are_counted_over_all_attempts() -> None:
    run = on_disk.make("r", on_disk.attempt())
    on_disk.log(run, 1, {1: on_disk.training(stale_groups=2), 2: on_disk.training(stale_groups=1, failed_groups=1)})
    found = summarize(find("r"))
    assert found.document()["dropped"] == {"stale_groups": 3, "failed_groups": 1}
    assert (
        "Dropped and not trained on: 3 groups older than trainer.max_staleness and 1 group with a response"
        in (found.notes[-1])
    )


def test_the_document_is_json() -> None:
    run = make("demo", attempt(1, status="failed", error="x"))
    log(run, 1, {1: sampled.logged(sampled.sample(0.15), 2)})
    document = json.loads(json.dumps(of("demo").document()))
    assert document["run"]["name"] == "demo"
    assert document["record"]["attempts"][0]["error"] == "x"
    a_run("empty")
    assert of("empty").document()["record"] is None

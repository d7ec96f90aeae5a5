"""One run in full: attempts, start, where the time goes, proof, and the advice with the cap of its own plan."""

from __future__ import annotations

import json
from dataclasses import asdict

from flashrl_cli import contract
from flashrl_cli.runs.store import Phase, find
from flashrl_cli.runs.summary import Summary, summarize
from tests.unit.render.test_live import shake
from tests.unit.runs import disk, sampled


def of(name: str) -> Summary:
    return summarize(find(name))


def test_attempts_with_how_long_they_took_and_how_they_ended() -> None:
    failed = disk.attempt(
        1, status="failed", ended=disk.LATER, exit_code=1, error="out of memory", hint="less", last_step=2
    )
    lost = disk.attempt(2, status="running", resumed_from=2, **disk.GONE)
    running = disk.attempt(3, status="running")
    disk.make("demo", failed, lost, running)
    one, two, three = of("demo").attempts
    assert (one.state, one.seconds, one.exit_code, one.error, one.hint) == ("failed", 5400, 1, "out of memory", "less")
    assert (two.state, two.seconds, two.resumed_from) == ("lost", 5400, 2)
    assert three.state == "running"
    assert three.seconds
    assert three.seconds > 5400


def test_attempts_without_a_record_are_what_their_folders_tell() -> None:
    run = disk.make("old")
    disk.log(run, 1, {"critic/score/mean": 0.1}, {"critic/score/mean": 0.2})
    run.attempt(2).root.mkdir()
    one, two = of("old").attempts
    assert (one.number, one.state, one.last_step) == (1, None, 2)
    assert (two.number, two.last_step) == (2, None)


def test_phases_of_the_start_last_until_the_next() -> None:
    phases = (
        Phase(name="starting Ray", began="2026-03-01T10:00:00+00:00"),
        Phase(name="loading the policy", began="2026-03-01T10:00:20+00:00"),
        Phase(name="sampling responses", began="2026-03-01T10:01:30+00:00"),
    )
    disk.make("demo", disk.attempt(phases=phases))
    assert [(one.what, one.seconds) for one in of("demo").start] == [("starting Ray", 20), ("loading the policy", 70)]


def test_phases_of_a_step_leave_out_what_warms_up() -> None:
    run = disk.make("demo", disk.attempt(1))
    disk.log(run, 1, *({"timing_s/step": s, "timing_s/gen": s / 2} for s in (80.0, 8.0, 12.0)))
    assert [(one.what, one.seconds) for one in of("demo").step] == [("generate", 5.0), ("other", 5.0)]


def test_the_curve_is_that_of_all_attempts_and_holes_are_told() -> None:
    run = disk.make("demo", disk.attempt(1), disk.attempt(2, resumed_from=1, set_aside=("global_step_2: torn",)))
    disk.log(run, 1, {"critic/score/mean": 0.1}, {"critic/score/mean": 0.2})
    disk.log(run, 2, {"critic/score/mean": 0.4}, first=4)
    found = of("demo")
    assert [(step.step, step["reward"]) for step in found.metrics.history] == [(1, 0.1), (4, 0.4)]
    assert found.metrics.missing == [2, 3]
    assert found.set_aside == ["global_step_2: torn"]


def test_the_proof_is_the_records_or_the_folders() -> None:
    disk.make("demo", disk.attempt(1, proof=(asdict(shake("fp8")),)), disk.attempt(2))
    assert [one.precision for one in of("demo").proof] == ["fp8"]
    old = disk.make("old")
    contract.write_handshake(old.attempt(1).plugins, shake())
    assert [one.precision for one in of("old").proof] == ["int8"]
    disk.make("none", disk.attempt(1, proof=({"another": "kind"},)))
    assert list(of("none").proof) == []
    (old.attempt(1).plugins / "x.json").write_text("{")
    assert list(of("old").proof) == []


def test_the_advice_is_on_the_newest_attempts_metrics_with_its_own_cap() -> None:
    run = disk.make("demo", disk.attempt(1), disk.attempt(2))
    disk.planned(run, 1, correction={"cap": 8.0})
    disk.planned(run, 2, correction={"cap": 2.0})
    disk.log(run, 1, sampled.logged(sampled.sample(1.0), 8))
    disk.log(run, 2, sampled.logged(sampled.sample(0.15), 2))
    advice = of("demo").advice
    assert (advice.cap, advice.verdict) == (2.0, "keep")


def test_the_document_is_json() -> None:
    run = disk.make("demo", disk.attempt(1, status="failed", error="x"))
    disk.log(run, 1, sampled.logged(sampled.sample(0.15), 2))
    document = of("demo").document()
    assert json.loads(json.dumps(document))["run"]["name"] == "demo"
    assert document["record"]["attempts"][0]["error"] == "x"
    assert of_nothing()["record"] is None


def of_nothing() -> dict[str, object]:
    disk.place("empty").root.mkdir(parents=True)
    return of("empty").document()

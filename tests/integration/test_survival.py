"""Runs that are interrupted and killed: whatever the moment, nothing stays behind, and the run goes on to its end."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from benchmarks import kill_resume

from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import record
from flashrl_cli.runs.history import history, holes
from flashrl_cli.runs.saved import saved_steps
from tests.integration.conftest import Workshop, events
from tests.integration.test_train import check_evaluation, check_plausible, check_proof

STEPS = 3
TRAIN = ("train", "--preset", "tiny", "--rollout", "int8", "--tis", "2", "--json", "--resume", "auto")
SHORT = ("--set", f"trainer.steps={STEPS}", "--set", "trainer.save_every=1")
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

Moment = Callable[[RunPaths, float], bool]
"""Whether it has come, given the run and the time that the command was started (seconds since the epoch)."""


def after(seconds: float) -> Moment:
    return lambda _, started: time.time() - started > seconds


def phase(name: str) -> Moment:
    """When the attempt that was just started is doing `name`."""

    def reached(run: RunPaths, started: float) -> bool:
        found = record.load(run.record)
        last = found.last if found else None
        return bool(last and last.pid_started >= started - 1 and any(one.name == name for one in last.phases))

    return reached


def saving(number: int) -> Moment:
    """While the checkpoint of a step is being written, or right after."""
    return lambda run, _: (run.checkpoints / f"global_step_{number}" / "actor").exists()


EARLY = [
    (after(0.5), INT),
    (phase("starting verl"), TERM),
    (phase("starting Ray"), INT),
    (phase("starting the trainer"), HUP),
    (phase("loading the policy"), INT),
    (phase("sending weights to the rollout engine"), TERM),
]
LATE = [
    (after(3), INT),
    (phase("loading the rollout engine"), INT),
    (phase("sampling responses"), HUP),
    (saving(1), INT),
]
STRIKES_WITHIN_S = 75.0
"""The strikes of this suite meet the start; benchmarks/kill_resume.py meets steps and saves, too."""


def interrupted(shop: Workshop, name: str, moments: list[tuple[Moment, signal.Signals]]) -> None:
    """Start the run `name` again and again and interrupt it at each moment; the exit code is the signal's."""
    run = RunPaths(name, shop.root / "runs" / name, shop.root / "checkpoints" / "tiny" / name)
    for moment, number in moments:
        started = time.time()
        process = shop.start(*TRAIN, *SHORT, "--name", name)
        while not moment(run, started) and process.poll() is None:
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        asked = time.monotonic()
        _, err = process.communicate(timeout=120)
        took = time.monotonic() - asked
        # before flashrl's own handlers stand, Python's and the system's defaults end it: by the signal, which shells tell as 128 + n
        assert process.returncode in {130 if number == INT else 143, -number}, err
        assert took < 75, f"{took:.0f} s"
        assert not [left for left in shop.leftovers() if f"/{name}/" in left]


@pytest.mark.timeout(1200)
def test_interrupted_at_ten_moments_then_trained_to_the_end(workshop: Workshop) -> None:
    """Two runs, each interrupted in its start, in a step and in a save; the second goes on to its end, proven and plausible."""
    assert len(EARLY) + len(LATE) >= 10
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(interrupted, workshop, name, m) for name, m in (("early", EARLY), ("late", LATE))]:
            done.result()
    run = RunPaths("late", workshop.root / "runs/late", workshop.root / "checkpoints/tiny/late")
    out, _ = workshop.run(*TRAIN, *SHORT, "--name", "late")
    steps = events(out, "step")
    assert steps[-1]["step"] == STEPS
    logged = history(run)
    assert [metrics.step for metrics in logged] == list(range(1, STEPS + 1))
    assert holes(logged) == []
    check_record(run)
    check_proof(out, run.attempt(run.attempts()[-1]).root)
    check_plausible(steps)
    check_evaluation(workshop, run.checkpoints)
    assert not workshop.leftovers()


def check_record(run: RunPaths) -> None:
    """Every attempt has its entry, with how it ended and where it went on."""
    found = record.load(run.record)
    assert found
    assert [attempt.number for attempt in found.attempts] == run.attempts()
    *interruptions, last = found.attempts
    assert {attempt.status for attempt in interruptions} == {"stopped"}
    assert (last.status, last.exit_code, last.last_step, last.total_steps) == ("done", 0, STEPS, STEPS)
    assert last.resumed_from in {None, 1}, "whatever the save was interrupted at"
    assert last.proof[0]["precision"] == "int8"
    assert last.phases[0].name == "starting verl"
    assert [one.step for one in saved_steps(run.checkpoints, critic=False) if one.complete] == [1, 2, 3]
    assert run.root.stat().st_mode & 0o777 == 0o700


def test_a_used_name_is_refused_and_a_complete_run_left_alone(workshop: Workshop) -> None:
    """After the test above: the run `late` is complete."""
    _, err = workshop.run(*TRAIN[:-2], *SHORT, "--name", "late", code=2)
    assert "--resume auto" in err
    out, err = workshop.run(*TRAIN, *SHORT, "--name", "late")
    assert out == ""
    assert "is complete" in err


@pytest.mark.timeout(1200)
def test_killed_at_five_random_moments(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KILL at flashrl or anything that it started, five times; then the run ends as if nothing had been."""
    monkeypatch.setenv("FLASHRL_DATA", str(workshop.root / "data"))
    result = kill_resume.one_run(tmp_path, kills=5, steps=2, seed=11, latest_s=STRIKES_WITHIN_S)
    assert len(result["strikes"]) == 5
    assert result["problems"] == [], json.dumps(result, indent=2)

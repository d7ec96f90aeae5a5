"""Following shows what another process does: from its record and its metrics, up to its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pytest

from flashrl_cli.runs import control, store
from flashrl_cli.runs.control import Ending, Follower, age
from flashrl_cli.runs.store import Attempt, Phase, find
from tests.unit.render.test_live import shake
from tests.unit.runs import disk
from tests.unit.train.conftest import Recorder

REWARD = {"critic/score/mean": 0.5}


class Screen(Recorder):
    """A display that also keeps the end."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[str, int, str | None]] = []

    def over(self, state: str, *, exit_code: int, error: str | None = None) -> None:
        self.ends.append((state, exit_code, error))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "FOLLOW_POLL_S", 0.01)
    monkeypatch.setattr(control, "RECORD_S", 0.02)


def follow(name: str, screen: Screen) -> Ending:
    run = find(name)
    assert run.last
    return Follower(run, run.last, screen).follow()


def phases(*names: str) -> tuple[Phase, ...]:
    return tuple(Phase(name=name, began=disk.THEN) for name in names)


def test_a_run_that_is_over_is_shown_once() -> None:
    proof = (asdict(shake()),)
    over = disk.attempt(status="failed", exit_code=3, error="no proof", hint="bf16", total_steps=9, proof=proof)
    run = disk.make("demo", over)
    disk.log(run, 1, REWARD, REWARD)
    screen = Screen()
    assert follow("demo", screen) == Ending("failed", 3, "bf16")
    assert (screen.steps, screen.total, screen.phases) == ([1, 2], 9, [])
    assert [one.precision for one in screen.proofs[0]] == ["int8"]
    assert screen.ends == [("failed", 3, "no proof")]


@pytest.mark.parametrize(
    ("fields", "state", "code"),
    [
        ({"status": "done", "exit_code": 0}, "done", 0),
        ({"status": "done"}, "done", 0),
        ({"status": "stopped", "exit_code": 130}, "stopped", 130),
        ({"status": "failed"}, "failed", 1),
        ({"status": "running", **disk.GONE}, "lost", 1),
    ],
)
def test_exit_codes(fields: dict[str, Any], state: str, code: int) -> None:
    disk.make("demo", disk.attempt(**fields))
    ending = follow("demo", Screen())
    assert (ending.state, ending.exit_code) == (state, code)


def test_only_the_newest_attempt_is_shown() -> None:
    run = disk.make("demo", disk.attempt(1), disk.attempt(2))
    disk.log(run, 1, REWARD)
    disk.log(run, 2, REWARD, first=5)
    screen = Screen()
    follow("demo", screen)
    assert screen.steps == [5]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_under_way_is_followed_to_its_end() -> None:
    run = disk.make("demo", disk.attempt(status="running", phases=phases("starting Ray")))
    screen, endings = Screen(), []
    thread = threading.Thread(target=lambda: endings.append(follow("demo", screen)))
    thread.start()
    wait_for(lambda: screen.phases == ["starting Ray"])
    store.renew(run, 1, phases=phases("starting Ray", "loading the policy"), total_steps=2, proof=(asdict(shake()),))
    wait_for(lambda: screen.phases == ["starting Ray", "loading the policy"] and screen.total == 2)
    run.record.write_text("{")  # a damaged record tells nothing, and ends nothing
    disk.log(run, 1, REWARD)
    wait_for(lambda: screen.steps == [1])
    run.record.unlink()
    store.change(run, lambda _: disk.a_record(run, disk.attempt(status="running", phases=phases("a", "b", "c"))))
    disk.log(run, 1, REWARD, first=2)
    store.renew(run, 1, status="done", exit_code=0)
    thread.join(10)
    assert endings == [Ending("done", 0, None)]
    assert screen.steps == [1, 2]
    assert screen.phases == ["starting Ray", "loading the policy"], "no phase of the start is told after a step"
    assert screen.ends == [("done", 0, None)]


def test_what_was_written_just_before_the_end_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    run = disk.make("demo", disk.attempt(status="running"))
    real = store.state

    def ends_meanwhile(attempt: Attempt) -> store.Status:
        state = real(attempt)
        if not run.attempt(1).metrics.exists():
            disk.log(run, 1, REWARD)
            store.renew(run, 1, status="done", exit_code=0)
        return state

    monkeypatch.setattr(store, "state", ends_meanwhile)
    screen = Screen()
    assert follow("demo", screen).state == "done"
    assert screen.steps == [1]


def test_one_that_ended_since_the_last_look_is_not_lost() -> None:
    run = disk.make("demo", disk.attempt(status="running", **disk.GONE))
    found = find("demo")
    assert found.last
    follower = Follower(found, found.last, Screen())
    store.renew(run, 1, status="stopped", exit_code=130)
    assert follower.follow() == Ending("stopped", 130, None)


def test_a_new_attempt_is_another_run_to_watch() -> None:
    run = disk.make("demo", disk.attempt(1, status="done", exit_code=0))
    found = find("demo")
    assert found.last
    follower = Follower(found, found.last, Screen())
    store.change(run, lambda _: disk.a_record(run, disk.attempt(1, exit_code=0), disk.attempt(2, status="running")))
    assert follower.follow().state == "done"


def test_age() -> None:
    assert age(disk.attempt(ended=disk.LATER)) == 5400
    started = datetime.now(UTC).isoformat()
    assert 0 <= age(disk.attempt(status="running", started=started)) < 60

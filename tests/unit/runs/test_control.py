"""Following shows what another process does, up to its end; stopping asks the very process that was recorded, and no
other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import psutil
import pytest

from flashrl_cli import paths
from flashrl_cli.errors import EnvironmentNotReady, InputError, RunFailed
from flashrl_cli.runs import control, store
from flashrl_cli.runs.control import Ending, Follower, age, stop
from flashrl_cli.runs.store import Attempt, Phase, find
from tests.conftest import starting_with
from tests.unit.runs import on_disk
from tests.unit.runs.on_disk import GONE, REWARD, attempt, handshake, log, make
from tests.unit.train.builders import Recorder


class Screen(Recorder):
    """A display that also keeps how runs ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[str, int, str | None]] = []

    def over(self, state: str, *, exit_code: int, error: str | None = None) -> None:
        self.ends.append((state, exit_code, error))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "FOLLOW_POLL_S", 0.01)
    monkeypatch.setattr(control, "RECORD_S", 0.02)


def follower(name: str, screen: Screen) -> Follower:
    run = find(name)
    assert run.last
    return Follower(run, run.last, screen)


def phases(*names: str) -> tuple[Phase, ...]:
    return tuple(Phase(name=name, began=on_disk.THEN) for name in names)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_that_is_over_is_shown_once_by_its_newest_attempt() -> None:
    proof = (asdict(handshake()),)
    failed = {"status": "failed", "exit_code": 3, "error": "no proof", "hint": "bf16", "total_steps": 9}
    run = make("demo", attempt(1), attempt(2, proof=proof, **failed))
    log(run, 1, {1: REWARD})
    log(run, 2, {5: REWARD, 6: REWARD})
    screen = Screen()
    assert follower("demo", screen).follow() == Ending("failed", 3, "bf16")
    assert (screen.steps, screen.total, screen.phases) == ([5, 6], 9, [])
    assert [one.precision for one in screen.proofs[0]] == ["int8"]
    assert screen.ends == [("failed", 3, "no proof")]


@pytest.mark.parametrize(
    ("fields", "state", "code"),
    [
        ({"status": "done", "exit_code": 0}, "done", 0),
        ({"status": "done"}, "done", 0),
        ({"status": "stopped", "exit_code": 130}, "stopped", 130),
        ({"status": "failed"}, "failed", 1),
        ({"status": "running", **GONE}, "lost", 1),
    ],
)
def test_exit_codes(fields: dict[str, Any], state: str, code: int) -> None:
    make("demo", attempt(**fields))
    ending = follower("demo", Screen()).follow()
    assert (ending.state, ending.exit_code) == (state, code)


def test_a_run_under_way_is_followed_to_its_end() -> None:
    run = make("demo", attempt(status="running", phases=phases("starting Ray")))
    screen, endings = Screen(), []
    thread = threading.Thread(target=lambda: endings.append(follower("demo", screen).follow()))
    thread.start()
    wait_for(lambda: screen.phases == ["starting Ray"])
    proof = (asdict(handshake()),)
    store.renew(run, 1, phases=phases("starting Ray", "loading the policy"), total_steps=2, proof=proof)
    wait_for(lambda: screen.phases == ["starting Ray", "loading the policy"] and screen.total == 2)
    run.record.write_text("{")  # a damaged record ends nothing
    log(run, 1, {1: REWARD})
    wait_for(lambda: screen.steps == [1])
    run.record.unlink()
    on_disk.write_record(run, [attempt(status="running", phases=phases("a", "b", "c"))])
    log(run, 1, {2: REWARD})
    store.renew(run, 1, status="done", exit_code=0)
    thread.join(10)
    assert endings == [Ending("done", 0, None)]
    assert screen.steps == [1, 2]
    assert screen.phases == ["starting Ray", "loading the policy"], "no phase of the start is shown after a step"
    assert screen.ends == [("done", 0, None)]


def test_what_was_written_just_before_the_end_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("demo", attempt(status="running"))
    real = store.state

    def ends_meanwhile(one: Attempt) -> store.Status:
        state = real(one)
        if not run.attempt(1).metrics.exists():
            log(run, 1, {1: REWARD})
            store.renew(run, 1, status="done", exit_code=0)
        return state

    screen = Screen()
    following = follower("demo", screen)
    monkeypatch.setattr(store, "state", ends_meanwhile)
    assert following.follow().state == "done"
    assert screen.steps == [1]


def test_one_that_ended_since_the_last_look_is_not_lost() -> None:
    run = make("demo", attempt(status="running", **GONE))
    following = follower("demo", Screen())
    store.renew(run, 1, status="stopped", exit_code=130)
    assert following.follow() == Ending("stopped", 130, None)


def test_a_new_attempt_is_another_run_to_watch() -> None:
    run = make("demo", attempt(1, exit_code=0))
    following = follower("demo", Screen())
    on_disk.write_record(run, [attempt(1, exit_code=0), attempt(2, status="running")])
    assert following.follow().state == "done"


def test_age() -> None:
    assert age(attempt(ended=on_disk.LATER)) == 5400
    assert 0 <= age(attempt(status="running", started=datetime.now(UTC).isoformat())) < 60


# stopping

SUPERVISOR = """
import signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, _: got.append(number))
print("ready", flush=True)
while len(got) < int(sys.argv[1]):
    time.sleep(0.02)
print(*got, flush=True)
"""
Starter = Callable[[int], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Starter]:
    """Start a process that ends after so many signals and prints them."""
    started: list[subprocess.Popen[str]] = []

    def run(signals: int) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(signals)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def running(process: subprocess.Popen[str] | None = None, **fields: Any) -> Attempt:
    pid = process.pid if process else os.getpid()
    own = {"pid": pid, "pid_started": psutil.Process(pid).create_time()}
    return attempt(**{"status": "running", "last_step": 7, **own, **fields})


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process may be signalled."""
    monkeypatch.setattr(psutil.Process, "send_signal", lambda *_: pytest.fail("signalled"))


@pytest.mark.processes
def test_it_is_asked_once_and_waited_for(start: Starter) -> None:
    process = start(1)
    make("demo", running(process))
    said: list[str] = []
    ended = stop(find("demo"), say=said.append)
    assert (ended.stopped, ended.attempt, ended.step) == (True, 1, 7)
    assert process.communicate()[0] == f"{int(signal.SIGTERM)}\n"
    assert str(process.pid) in said[0]
    assert "90 s" in said[0]


@pytest.mark.processes
@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
def test_at_once_it_gets_a_second_signal(start: Starter, disposition: signal.Handlers) -> None:
    """Also where it was started in the background of a script, and ignores INT."""
    with starting_with(disposition, signal.SIGINT):
        process = start(2)
    make("demo", running(process))
    assert stop(find("demo"), at_once=True).stopped
    got = [signal.Signals(int(number)) for number in process.communicate()[0].split()]
    assert (got[0], len(got) >= 2) == (signal.SIGTERM, True)
    assert set(got) <= {signal.SIGTERM} | ({signal.SIGINT} if disposition == signal.SIG_DFL else set())


@pytest.mark.processes
def test_one_that_goes_on_after_the_plans_grace_is_an_error(start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("demo", running(start(9)))
    on_disk.planned(run, 1, watch={"stop_grace_s": 0.3})
    monkeypatch.setattr(control, "MORE_S", 0.2)
    began = time.monotonic()
    with pytest.raises(RunFailed, match="still runs after") as caught:
        stop(find("demo"))
    assert 0.5 <= time.monotonic() - began < control.GRACE_S
    assert caught.value.hint == "flashrl runs stop demo --now"


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"status": "done"}, "done"),
        ({"status": "failed"}, "failed"),
        ({"status": "stopped"}, "stopped"),
        ({"pid_started": 5.0}, "lost"),  # another process has that pid now
        (GONE, "lost"),
    ],
)
def test_nothing_to_do_for_one_that_is_over(fields: dict[str, Any], state: str) -> None:
    make("demo", running(**fields))
    ended = stop(find("demo"))
    assert (ended.stopped, ended.state) == (False, state)


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    ("address", "command"),
    [
        ("http://head:8265", "ray job stop --address http://head:8265 flashrl-demo-1"),
        (None, "ray job stop flashrl-demo-1"),
    ],
)
def test_a_ray_job_without_its_supervisor_needs_ray(address: str | None, command: str) -> None:
    make("demo", running(**GONE, executor="ray", ray_address=address, job_id="flashrl-demo-1"))
    with pytest.raises(EnvironmentNotReady, match="may still run") as caught:
        stop(find("demo"))
    assert caught.value.hint == command


@pytest.mark.usefixtures("never")
def test_another_machines_is_stopped_there() -> None:
    make("my run", running(host="node7"))
    with pytest.raises(EnvironmentNotReady, match="runs on node7") as caught:
        stop(find("my run"), at_once=True)
    hint = str(caught.value.hint)
    assert hint.startswith("ssh node7 ")
    assert f"FLASHRL_RUNS={paths.runs_root()}" in hint
    assert hint.endswith("--now'")


@pytest.mark.usefixtures("never")
def test_without_a_record_no_process_is_known() -> None:
    make("old")
    with pytest.raises(InputError, match="before records were kept"):
        stop(find("old"))
    make("broken", running()).record.write_text("{")
    with pytest.raises(InputError, match="is no run record"):
        stop(find("broken"))


def test_another_users_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise psutil.AccessDenied

    make("demo", running())
    monkeypatch.setattr(psutil.Process, "send_signal", refuse)
    with pytest.raises(EnvironmentNotReady, match="another user"):
        stop(find("demo"))

"""Stopping asks the very process that was recorded, waits for it, and signals nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from flashrl_cli import paths
from flashrl_cli.errors import EnvironmentNotReady, InputError, RunFailed
from flashrl_cli.runs import control
from flashrl_cli.runs.control import stop
from flashrl_cli.runs.store import Attempt, find
from tests.conftest import starting_with
from tests.unit.runs import disk

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


@pytest.fixture
def start() -> Iterator[Callable[[int], subprocess.Popen[str]]]:
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
    given: dict[str, Any] = {"status": "running", "last_step": 7, **own, **fields}
    return disk.attempt(**given)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process may be signalled."""
    monkeypatch.setattr(psutil.Process, "send_signal", lambda *_: pytest.fail("signalled"))


@pytest.mark.processes
def test_it_is_asked_once_and_waited_for(start: Callable[[int], subprocess.Popen[str]]) -> None:
    process = start(1)
    disk.make("demo", running(process))
    said: list[str] = []
    ended = stop(find("demo"), say=said.append)
    assert (ended.stopped, ended.attempt, ended.step) == (True, 1, 7)
    assert process.communicate()[0] == f"{int(signal.SIGTERM)}\n"
    assert str(process.pid) in said[0]
    assert "90 s" in said[0]


@pytest.mark.processes
@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
def test_at_once_it_gets_a_second_signal(
    start: Callable[[int], subprocess.Popen[str]], disposition: signal.Handlers
) -> None:
    """Also where it was started in the background of a script, and ignores INT."""
    with starting_with(disposition, signal.SIGINT):
        process = start(2)
    disk.make("demo", running(process))
    assert stop(find("demo"), at_once=True).stopped
    got = [signal.Signals(int(number)) for number in process.communicate()[0].split()]
    assert (got[0], len(got) >= 2) == (signal.SIGTERM, True)
    assert set(got) <= {signal.SIGTERM} | ({signal.SIGINT} if disposition == signal.SIG_DFL else set())


@pytest.mark.processes
def test_one_that_goes_on_is_told_after_the_plans_grace(
    start: Callable[[int], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = disk.make("demo", running(start(9)))
    disk.planned(run, 1, watch={"stop_grace_s": 0.3})
    monkeypatch.setattr(control, "MORE_S", 0.2)
    began = time.monotonic()
    with pytest.raises(RunFailed, match="still runs after") as caught:
        stop(find("demo"))
    assert 0.5 <= time.monotonic() - began < control.GRACE_S
    assert caught.value.hint == "flashrl runs stop demo --now"


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("status", ["done", "failed", "stopped"])
def test_nothing_to_do_for_one_that_is_over(status: str) -> None:
    disk.make("demo", disk.attempt(status=status))
    ended = stop(find("demo"))
    assert (ended.stopped, ended.state) == (False, status)


@pytest.mark.usefixtures("never")
def test_another_process_of_the_same_number_is_left_alone() -> None:
    disk.make("demo", running(pid_started=psutil.Process().create_time() - 100))
    ended = stop(find("demo"))
    assert (ended.stopped, ended.state) == (False, "lost")


@pytest.mark.usefixtures("never")
def test_a_process_that_is_gone_is_lost() -> None:
    disk.make("demo", running(**disk.GONE))
    assert stop(find("demo")).state == "lost"


@pytest.mark.usefixtures("never")
def test_a_ray_job_without_its_supervisor_needs_ray() -> None:
    ray: dict[str, Any] = {"executor": "ray", "ray_address": "http://head:8265", "job_id": "flashrl-demo-1"}
    disk.make("demo", running(**disk.GONE, **ray))
    with pytest.raises(EnvironmentNotReady, match="may still run") as caught:
        stop(find("demo"))
    assert caught.value.hint == "ray job stop --address http://head:8265 flashrl-demo-1"
    disk.make("local", running(**disk.GONE, **(ray | {"ray_address": None})))
    with pytest.raises(EnvironmentNotReady) as caught:
        stop(find("local"))
    assert caught.value.hint == "ray job stop flashrl-demo-1"


@pytest.mark.usefixtures("never")
def test_another_machines_is_stopped_there() -> None:
    disk.make("my run", running(host="node7"))
    with pytest.raises(EnvironmentNotReady, match="runs on node7") as caught:
        stop(find("my run"), at_once=True)
    hint = str(caught.value.hint)
    assert hint.startswith("ssh node7 ")
    assert f"FLASHRL_RUNS={paths.runs_root()}" in hint
    assert hint.endswith("--now'")


@pytest.mark.usefixtures("never")
def test_without_a_record_no_process_is_known() -> None:
    disk.make("old")
    with pytest.raises(InputError, match="before records were kept"):
        stop(find("old"))
    run = disk.make("broken", running())
    run.record.write_text("{")
    with pytest.raises(InputError, match="is no run record"):
        stop(find("broken"))


def test_another_users_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise psutil.AccessDenied

    disk.make("demo", running())
    monkeypatch.setattr(psutil.Process, "send_signal", refuse)
    with pytest.raises(EnvironmentNotReady, match="another user"):
        stop(find("demo"))

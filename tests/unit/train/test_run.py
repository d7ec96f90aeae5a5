"""The record says what became of an attempt, however it ended; a detached one is on record once it has begun."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from flashrl_cli.cli import app
from flashrl_cli.errors import EnvironmentNotReady, ExitCode, FlashrlError, InputError, RunFailed
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt
from flashrl_cli.signals import Interrupted
from flashrl_cli.train import run as run_module
from flashrl_cli.train.executors import start_here
from flashrl_cli.train.plan import LaunchPlan
from flashrl_cli.train.run import NotStarted, console, detach, git_state, run_plan
from flashrl_cli.verl.metrics import read_step
from tests.unit.train.builders import handshake


@pytest.fixture
def attempted(
    tiny_plan: Callable[..., LaunchPlan], monkeypatch: pytest.MonkeyPatch, seen: Any
) -> Callable[..., Attempt]:
    """`attempted(error)`: what the record says of an attempt that did two steps and then ended with `error`."""

    def attempt(error: BaseException | None = None, plan: LaunchPlan | None = None) -> Attempt:
        chosen = plan or tiny_plan()

        def fake(plan: LaunchPlan, display: Any, _: list[int], **__: Any) -> int:
            found = store.load(plan.paths.record)
            assert found
            assert found.last
            assert (found.last.status, store.state(found.last)) == ("running", "running")
            display.phase("starting Ray")
            display.phase("sampling responses")
            display.expect(9)
            display.proven([handshake()])
            display.step(read_step(0, {"val-core/tiny/acc/mean@1": 0.5}))
            display.step(read_step(1, {"critic/score/mean": 0.1}))
            display.step(read_step(2, {"critic/score/mean": 0.2}))
            display.tick()
            if error:
                raise error
            return 2

        monkeypatch.setattr(run_module, "supervise", fake)
        monkeypatch.setattr(run_module, "git_state", lambda _: {"commit": "abc", "branch": "main", "dirty": False})
        command = ("flashrl", "train", "--set", "env.HF_TOKEN=hf_" + "a" * 30)
        if error is None:
            assert run_plan(chosen, seen, start=start_here, command=command) == 2
        else:
            with pytest.raises(type(error)):
                run_plan(chosen, seen, start=start_here, command=command)
        found = store.load(chosen.paths.record)
        assert found
        assert found.last
        return found.last

    return attempt


def test_a_finished_attempt(attempted: Callable[..., Attempt], seen: Any) -> None:
    found = attempted()
    assert (found.number, found.status, found.exit_code, found.error) == (1, "done", 0, None)
    assert (found.last_step, found.total_steps, found.resumed_from) == (2, 9, None)
    assert [phase.name for phase in found.phases] == ["starting Ray", "sampling responses"]
    assert [handshake["kernel"] for handshake in found.proof] == ["K"]
    assert found.started <= found.updated <= str(found.ended)
    assert (found.host, found.pid) == (socket.gethostname(), os.getpid())
    assert found.versions["flashrl-cli"]
    assert found.git == {"commit": "abc", "branch": "main", "dirty": False}
    assert found.argv == ("flashrl", "train", "--set", "env.HF_TOKEN=***")
    assert seen.phases == ["starting Ray", "sampling responses"]
    assert seen.steps == [0, 1, 2]
    assert (seen.total, seen.ticks, len(seen.proofs)) == (9, 1, 1)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RunFailed("it broke\n  | log", hint="fix it"), "failed", 1),
        (EnvironmentNotReady("it broke", hint="fix it"), "failed", 3),
        (Interrupted(2, "fix it"), "stopped", 130),
        (Interrupted(15, "fix it"), "stopped", 143),
        (Interrupted(1, "fix it"), "stopped", 143),
        (KeyboardInterrupt(), "failed", 130),
        (OSError(errno.EACCES, "Permission denied", "/runs/r"), "failed", 3),
        (OSError(errno.ENOSPC, "No space left on device"), "failed", 3),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "failed", 70),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "failed", 1),
        (ZeroDivisionError("it broke"), "failed", 70),
        (MemoryError(), "failed", 70),
    ],
    ids=repr,
)
def test_how_an_attempt_ended_with_the_exit_code_of_the_process(
    error: BaseException, status: str, code: int, attempted: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = attempted(error)
    assert (found.status, found.exit_code, found.last_step) == (status, code, 2)
    assert found.ended
    assert "\n" not in str(found.error)
    assert found.hint == ("fix it" if status == "failed" and isinstance(error, FlashrlError) else None)
    command = typer.Typer(pretty_exceptions_enable=False)

    @command.command()
    def train() -> None:
        raise error

    monkeypatch.setattr(app, "app", lambda _words: command([]))
    for debug in ("", "1"):
        monkeypatch.setenv("FLASHRL_DEBUG", debug)
        with pytest.raises(SystemExit) as caught:
            app.main()
        assert caught.value.code == code


def test_a_later_attempt_keeps_the_earlier(
    attempted: Callable[..., Attempt], tiny_plan: Callable[..., LaunchPlan]
) -> None:
    first = attempted(RunFailed("it broke"))
    plan = tiny_plan()
    attempted(plan=dataclasses.replace(plan, attempt=2, attempt_paths=plan.paths.attempt(2)))
    found = store.load(tiny_plan().paths.record)
    assert found
    assert found.attempts[0] == first
    assert [one.number for one in found.attempts] == [1, 2]


def test_one_of_two_that_want_the_same_attempt_is_refused(
    attempted: Callable[..., Attempt], tiny_plan: Callable[..., LaunchPlan], seen: Any
) -> None:
    attempted()
    with pytest.raises(InputError, match="attempt 1 of run r was just started elsewhere"):
        run_plan(tiny_plan(), seen, start=start_here)


def test_a_run_under_way_elsewhere_is_refused(
    attempted: Callable[..., Attempt], tiny_plan: Callable[..., LaunchPlan], seen: Any
) -> None:
    attempted()
    store.renew(tiny_plan().paths, 1, status="running", host="far")
    with pytest.raises(InputError, match=r"run r is under way: attempt 1, process .* on far"):
        run_plan(dataclasses.replace(tiny_plan(), attempt=2), seen, start=start_here)


def test_a_record_that_cannot_be_renewed_does_not_end_the_run(
    attempted: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    renew = store.renew

    def full(*args: Any, **fields: Any) -> None:
        if "status" not in fields:
            raise OSError(28, "No space left on device")
        renew(*args, **fields)

    monkeypatch.setattr(store, "renew", full)
    assert attempted().status == "done"


def test_a_reader_that_went_away_does_not_end_the_run(
    attempted: Callable[..., Attempt], seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError

    for event in ("expect", "phase", "proven", "step", "tick"):
        monkeypatch.setattr(seen, event, closed)
    found = attempted()
    assert (found.status, found.last_step) == ("done", 2)


@pytest.mark.processes
def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    commands = [
        ["init", "-q", "-b", "trunk"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ]
    for words in commands:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    found = git_state(tmp_path)
    assert found
    assert (found["branch"], found["dirty"], len(found["commit"])) == ("trunk", False, 40)
    (tmp_path / "new").write_text("")
    subprocess.run(["git", "-C", str(tmp_path), "add", "new"], check=True)
    found = git_state(tmp_path)
    assert found
    assert found["dirty"]
    assert git_state(tmp_path / "nowhere") is None


STARTS = """
import os, sys, time
from pathlib import Path
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
root = Path(sys.argv[1])
own = store.own_process()
attempt = store.Attempt(number=1, status="running", started="", updated="", **own)
run = store.RunRecord(name="r", project="p", preset="t", created="", checkpoints="", attempts=(attempt,))
store.change(RunPaths("r", root, root), lambda _: run)
print("session", os.getsid(0) == os.getpid(), sys.argv[2:], sys.stdin.read(), flush=True)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths("r", tmp_path / "runs/r", tmp_path / "checkpoints/r")


def flashrl_is(script: str, run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `python -m flashrl_cli` run `script`."""
    start = subprocess.Popen

    def instead(command: list[str], **options: Any) -> object:
        assert command[:4] == [sys.executable, "-P", "-m", "flashrl_cli"]
        return start([sys.executable, "-c", script, str(run.root), *command[4:]], **options)

    monkeypatch.setattr(subprocess, "Popen", instead)


@pytest.mark.processes
def test_a_detached_run_goes_on_in_a_session_of_its_own(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    flashrl_is(STARTS, run, monkeypatch)
    attempt = detach(run, ["train", "--detach", "--preset", "tiny"])
    assert attempt.number == 1
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700
    deadline = time.monotonic() + 60
    while not console(run).read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert console(run).read_text() == "session True ['train', '--preset', 'tiny'] \n"


@pytest.mark.processes
@pytest.mark.parametrize(("code", "exit_code"), [(2, ExitCode.USAGE), (3, ExitCode.ENVIRONMENT), (99, ExitCode.FAILED)])
def test_a_detached_run_that_ends_before_it_begins_is_reported(
    code: int, exit_code: ExitCode, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.root.mkdir(parents=True)
    console(run).write_text("of yesterday\n")
    flashrl_is(f"import sys; print('error: no GPU'); sys.exit({code})", run, monkeypatch)
    with pytest.raises(NotStarted, match="error: no GPU") as caught:
        detach(run, ["train", "--detach"])
    assert caught.value.exit_code == exit_code
    assert "yesterday" not in caught.value.message
    assert str(console(run)) in str(caught.value.hint)

"""Graders, with a scorer of a few lines: what hangs, dies or fails costs itself, and nothing stays behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.evals.graders import Graders
from flashrl_cli.machine import software
from tests.unit.evals import graders_at_work

pytestmark = pytest.mark.processes
RIGHT = {"score": 1.0, "correct": True, "flexible": None, "boxed": None, "prediction": None, "problem": None}
WRONG = {**RIGHT, "score": 0.0, "correct": False}
BUSY = {**WRONG, "problem": "grading took more than 1 s of a CPU"}
WAITING = {**WRONG, "problem": "grading took longer than 12 s"}
ENOUGH_S = 120


class Script:
    """The script, started on some responses."""

    def __init__(self, folder: Path, *responses: str, **env: str) -> None:
        graders_at_work.write_packages(folder / "packages")
        self.out = folder / "grades.json"
        path = os.pathsep.join([str(folder / "packages"), *sys.path])
        command = [sys.executable, graders_at_work.__file__, str(self.out), *responses]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def grades(self) -> list[dict[str, Any]]:
        """Its result, once it has ended well and in silence."""
        out, err = self.process.communicate(timeout=ENOUGH_S)
        assert self.process.returncode == 0, err
        assert (out.replace("grading\n", ""), err) == ("", "")
        found: list[dict[str, Any]] = json.loads(self.out.read_text())
        return found

    def at_work(self) -> list[psutil.Process]:
        """What it has started, all of it, while responses are being graded."""
        assert self.process.stdout
        assert self.process.stdout.readline() == "grading\n"
        deadline = time.monotonic() + ENOUGH_S
        while len(found := psutil.Process(self.process.pid).children(recursive=True)) < 4:
            assert time.monotonic() < deadline, "the tracker, the server and two graders are expected"
            time.sleep(0.1)
        return found


def remaining(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that are not gone after `seconds`; one that nobody has asked for its exit code is gone."""
    alive = psutil.wait_procs(processes, timeout=seconds)[1]
    return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_grades_come_in_order_and_a_failure_costs_itself_alone(tmp_path: Path) -> None:
    script = Script(tmp_path, "@40:right", "wrong", "raise", "@40:right", "wrong")
    raised = {**WRONG, "problem": "verl's scorer failed: ValueError: no such brace"}
    assert script.grades() == [*[RIGHT] * 40, WRONG, raised, *[RIGHT] * 40, WRONG]


def test_what_hangs_or_is_killed_costs_its_grader(tmp_path: Path) -> None:
    script = Script(tmp_path, "@5:right", "hang", "@30:right", "killed", "fork", "right")
    killed = {**WRONG, "problem": "its grader ended with SIGKILL: was memory short?"}
    started = script.at_work()
    assert script.grades() == [*[RIGHT] * 5, BUSY, *[RIGHT] * 30, killed, WAITING, RIGHT]
    assert not remaining(started, ENOUGH_S)


def test_graders_that_die_with_nothing_to_do_are_replaced(tmp_path: Path) -> None:
    assert Script(tmp_path, "@70:right", "wrong", KILL_IDLE="1").grades() == [*[RIGHT] * 70, WRONG]


def test_a_scorer_without_its_library_is_no_verdict(tmp_path: Path) -> None:
    _, err = Script(tmp_path, "lacks").process.communicate(timeout=ENOUGH_S)
    assert "EnvironmentNotReady: responses cannot be graded: No module named 'pylatexenc'" in err


@pytest.mark.parametrize("what", ["hang", "sleep", "fork"])
def test_a_killed_command_line_leaves_nothing_behind(tmp_path: Path, what: str) -> None:
    script = Script(tmp_path, what, "sleep")
    started = script.at_work()
    script.process.kill()
    script.process.communicate(timeout=ENOUGH_S)
    assert not remaining(started, ENOUGH_S)


def test_an_interrupt_ends_all_at_once_and_in_silence(tmp_path: Path) -> None:
    script = Script(tmp_path, "hang", "fork")
    started = script.at_work()
    os.killpg(script.process.pid, signal.SIGINT)
    _, err = script.process.communicate(timeout=ENOUGH_S)
    assert err.count("Traceback") == 1, "that of the script, which is no command"
    assert not remaining(started, ENOUGH_S)


@pytest.mark.parametrize(
    ("package", "hint"),
    [
        ("pebble", software.install_extra("eval")),
        ("math_verify", software.install_extra("eval")),
        ("verl", software.INSTALL),
    ],
)
def test_a_missing_package_is_named(package: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(EnvironmentNotReady, match=f"{package} is not installed") as caught:
        Graders(workers=1)
    assert caught.value.hint == hint

"""A detached run is told once it is on record, and its failure to start is told with what it said."""

from __future__ import annotations

import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.errors import ExitCode
from flashrl_cli.paths import RunPaths
from flashrl_cli.train.run import NotStarted, console, detach

pytestmark = pytest.mark.processes

STARTS = """
import os, sys, time
from pathlib import Path
from typing import Any
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store as record
root = Path(sys.argv[1])
own = record.own_process()
attempt = record.Attempt(number=1, status="running", started="", updated="", **own)
run = record.RunRecord(name="r", project="p", preset="t", created="", checkpoints="", attempts=(attempt,))
record.change(RunPaths("r", root, root), lambda _: run)
print("session", os.getsid(0) == os.getpid(), sys.argv[2:], sys.stdin.read(), flush=True)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths("r", tmp_path / "runs/r", tmp_path / "checkpoints/r")


def flashrl_is(script: str, run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `python -m flashrl_cli` run `script`."""
    start = subprocess.Popen

    def instead(command: list[str], **options: Any) -> object:
        assert command[:3] == [sys.executable, "-m", "flashrl_cli"]
        return start([sys.executable, "-c", script, str(run.root), *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", instead)


def test_it_goes_on_in_a_session_of_its_own(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    flashrl_is(STARTS, run, monkeypatch)
    attempt = detach(run, ["train", "--detach", "--preset", "tiny"])
    assert attempt.number == 1
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700
    deadline = time.monotonic() + 60
    while not console(run).read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert console(run).read_text() == "session True ['train', '--preset', 'tiny'] \n"


@pytest.mark.parametrize(("code", "exit_code"), [(2, ExitCode.USAGE), (3, ExitCode.ENVIRONMENT), (99, ExitCode.FAILED)])
def test_what_ends_it_before_it_begins_is_told(
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

"""A run that goes on without the terminal it was started in."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.errors import ExitCode, FlashrlError, RunFailed
from flashrl_cli.runs import record
from flashrl_cli.runs.tail import Tail

if TYPE_CHECKING:
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.record import Attempt

FLAG = "--detach"
POLL_S = 0.1
TAIL_LINES = 20


class NotStarted(RunFailed):
    """The detached process ended before it began the attempt; its exit code is this one's."""

    def __init__(self, code: int, said: Sequence[str], console: Path) -> None:
        super().__init__("\n".join(["the detached run did not start", *(f"  | {line}" for line in said)]))
        self.hint = f"all it said: {console}"
        self.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED


def console(run: RunPaths) -> Path:
    """What a detached process of `run` would have written to its terminal."""
    return run.root / "console.log"


def detach(run: RunPaths, command: Sequence[str]) -> Attempt:
    """Run flashrl's `command` (less `--detach`) in a session of its own; returns once its attempt is on record.

    Raises NotStarted, with what it said, if it ends before.
    """
    said = console(run)
    run.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with said.open("ab") as stream:
        tail = Tail(said, start=stream.tell())
        child = subprocess.Popen(
            [sys.executable, "-m", "flashrl_cli", *(word for word in command if word != FLAG)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while True:
        ended = child.poll()
        if attempt := _attempt_of(run, child.pid):
            child.returncode = 0  # it outlives this process, which Popen would warn of
            return attempt
        if ended is not None:
            raise NotStarted(ended, tail.poll(ended=True)[-TAIL_LINES:], said)
        time.sleep(POLL_S)


def _attempt_of(run: RunPaths, pid: int) -> Attempt | None:
    try:
        found = record.load(run.record)
    except FlashrlError:
        return None
    last = found.last if found else None
    return last if last and last.pid == pid else None

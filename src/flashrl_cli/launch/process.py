"""A child process with everything it starts, so that all of it can be ended.

Ray puts its daemons into sessions of their own and rewrites process titles, so neither process groups nor environments find
them again. On Linux this process becomes the "subreaper" instead: whatever loses its parent becomes a child of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

PR_SET_CHILD_SUBREAPER = 36
PR_SET_PDEATHSIG = 1


class Tree:
    """A started command and all its descendants."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> None:
        """Start `argv` in its own session with both outputs appended to `log`."""
        _adopt_orphans()
        self._before = set(psutil.Process().children(recursive=True))
        self._known: set[psutil.Process] = set()
        with log.open("ab") as stream:
            self._child = _start(argv, env=env, cwd=cwd, stream=stream)
        self.pid = self._child.pid

    def poll(self) -> int | None:
        """Exit code of the command itself, None while it runs; a signal's number negative."""
        return self._child.poll()

    def processes(self) -> list[psutil.Process]:
        """Everything that the command started and that still runs, also what has lost its parent."""
        # a psutil.Process is equal to another of the same pid only if it started at the same time
        self._known.update(set(psutil.Process().children(recursive=True)) - self._before)
        return [process for process in self._known if _alive(process)]

    def terminate(self) -> None:
        """Ask the command to end."""
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGTERM)

    def kill(self, *, grace_s: float = 0.0) -> None:
        """End every process of the tree, at the latest after `grace_s` by KILL, until none is left."""
        if grace_s:
            _signal_all(self.processes(), signal.SIGTERM)
            _wait(self.processes(), grace_s)
        for _ in range(50):
            left = self.processes()
            if not left:
                break
            _signal_all(left, signal.SIGKILL)
            _wait(left, 0.2)
        self._child.wait()
        _reap()


def _start(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, stream: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - one system call
    )


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    """Have the kernel ask the child to end when this process is killed: nobody would watch the run any more."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal_all(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)


def _wait(processes: Sequence[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _reap() -> None:
    """Collect adopted children that have ended, or they stay as zombies until this process ends."""
    for process in psutil.Process().children():
        if not _alive(process):
            with contextlib.suppress(psutil.Error, psutil.TimeoutExpired):
                process.wait(0)

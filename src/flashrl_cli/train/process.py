"""Commands with everything they start, so that all of it can be ended.

Ray puts its daemons into sessions of their own and rewrites process titles, so neither process groups nor environments
find them again. On Linux this process becomes the "subreaper" instead: whatever loses its parent becomes a child of
ours. Between us and the command is a guardian (`train.guardian`), a subreaper too: when we are killed, it ends the
command, and when it is killed, we do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil

if TYPE_CHECKING:
    from flashrl_cli.train.plan import LaunchPlan


class Handle(Protocol):
    """A plan under way (`Tree`, `ray_job.RayJob`): its files appear in the attempt's folder while `tend` is called."""

    def poll(self) -> int | None:
        """Exit code of the command, None while it runs; a signal's number negative."""

    def tend(self) -> None:
        """Note new processes, or fetch what a cluster has logged; called several times a second."""

    def terminate(self) -> None:
        """Ask the command to end."""

    def kill(self, *, grace_s: float = 0.0) -> None:
        """End everything that it started, at the latest after `grace_s` by force, and wait until none is left."""


Start = Callable[["LaunchPlan"], Handle]
"""Starts a plan; raises EnvironmentNotReady where it cannot."""


PR_SET_CHILD_SUBREAPER = 36
GUARDIAN = "flashrl_cli.train.guardian"


class Descendants:
    """What this process starts from now on, with all that it starts in turn, also what has lost its parent."""

    def __init__(self) -> None:
        adopt_orphans()
        self._before = set(psutil.Process().children(recursive=True))
        self._known: set[psutil.Process] = set()

    def note(self) -> None:
        """Remember what runs now, where orphans are adopted by others; on Linux they come to us."""
        if sys.platform != "linux":
            self.alive()

    def alive(self) -> list[psutil.Process]:
        """Those that still run."""
        # a psutil.Process is equal to another of the same pid only if it started at the same time
        self._known.update(set(psutil.Process().children(recursive=True)) - self._before)
        return [process for process in self._known if _alive(process)]

    def kill(self, *, grace_s: float = 0.0, unasked: int | None = None) -> None:
        """End every one of them, at the latest after `grace_s` by KILL, until none is left.

        The process `unasked` is not asked first: it ends by itself when the others do.
        """
        if grace_s:
            _signal_all([process for process in self.alive() if process.pid != unasked], signal.SIGTERM)
            _wait(self.alive(), grace_s)
        for _ in range(50):
            left = self.alive()
            if not left:
                break
            _signal_all(left, signal.SIGKILL)
            _wait(left, 0.2)


class Tree:
    """A started command and all its descendants: a `Handle`."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> None:
        """Start `argv` under a guardian, in its own session, with both outputs appended to `log`."""
        self._descendants = Descendants()
        theirs, self._lifeline = os.pipe()
        with log.open("ab") as stream:
            self._guardian = subprocess.Popen(
                [sys.executable, "-m", GUARDIAN, str(theirs), *argv],
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(theirs,),
            )
        os.close(theirs)
        self.pid = self._guardian.pid

    def poll(self) -> int | None:
        """Exit code of the command, None while it runs; a signal's number negative."""
        return self._guardian.poll()

    def tend(self) -> None:
        """Note what has been started."""
        self._descendants.note()

    def processes(self) -> list[psutil.Process]:
        """Everything that was started and that still runs."""
        return self._descendants.alive()

    def terminate(self) -> None:
        """Ask the command to end; the guardian passes it on."""
        with contextlib.suppress(ProcessLookupError):
            self._guardian.send_signal(signal.SIGTERM)

    def kill(self, *, grace_s: float = 0.0) -> None:
        """End every process of the tree, at the latest after `grace_s` by KILL, until none is left."""
        # the guardian would pass TERM on, and the command be asked twice
        self._descendants.kill(grace_s=grace_s, unasked=self.pid)
        self._guardian.wait()
        with contextlib.suppress(OSError):  # a second kill finds it closed
            os.close(self._lifeline)
        _reap()


def adopt_orphans() -> None:
    """Become the parent of whatever loses its own below this process; Linux only, nothing happens elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


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

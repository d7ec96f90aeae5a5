"""Run commands so that all processes that they start can be ended.

Ray moves its daemons into separate sessions and rewrites process titles, so neither process groups nor environments
identify them. On Linux this process therefore becomes the "subreaper": processes that lose their parent become its
children. Between this process and the command is a guardian (`train.guardian`), which is a subreaper too: it ends the
command when this process is killed, and this process ends the command when the guardian is killed.
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
    """A plan being executed (`Tree`, `ray_job.RayJob`); `tend` keeps the files in the attempt's folder up to date."""

    def poll(self) -> int | None:
        """Exit code of the command (a signal's number negative), or None while it runs."""

    def tend(self) -> None:
        """Note new processes, or fetch what a cluster has logged; called several times a second."""

    def terminate(self) -> None:
        """Ask the command to end."""

    def kill(self, *, grace_s: float = 0.0) -> None:
        """End all processes of the command, by force after `grace_s`, and wait until none is left."""


Start = Callable[["LaunchPlan"], Handle]
"""Function that starts a plan; raises EnvironmentNotReady if that is impossible."""


PR_SET_CHILD_SUBREAPER = 36
GUARDIAN = "flashrl_cli.train.guardian"


class Descendants:
    """All processes that this process starts from now on, with their descendants and orphans."""

    def __init__(self) -> None:
        adopt_orphans()
        self._before = set(psutil.Process().children(recursive=True))
        self._known: set[psutil.Process] = set()

    def note(self) -> None:
        """Record the running processes where orphans are adopted by others; on Linux they come to this process."""
        if sys.platform != "linux":
            self.alive()

    def alive(self) -> list[psutil.Process]:
        """The processes that still run."""
        # a psutil.Process equals another one of the same pid only if both started at the same time
        self._known.update(set(psutil.Process().children(recursive=True)) - self._before)
        return [process for process in self._known if _alive(process)]

    def kill(self, *, grace_s: float = 0.0, unasked: int | None = None) -> None:
        """End all of these processes, with KILL after `grace_s`, until none is left.

        The process `unasked` gets no TERM: it ends by itself when the others do.
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
        """Exit code of the command (a signal's number negative), or None while it runs."""
        return self._guardian.poll()

    def tend(self) -> None:
        """Record the processes that have been started."""
        self._descendants.note()

    def processes(self) -> list[psutil.Process]:
        """All started processes that still run."""
        return self._descendants.alive()

    def terminate(self) -> None:
        """Ask the command to end; the guardian forwards the signal."""
        with contextlib.suppress(ProcessLookupError):
            self._guardian.send_signal(signal.SIGTERM)

    def kill(self, *, grace_s: float = 0.0) -> None:
        """End every process of the tree, with KILL after `grace_s`, until none is left."""
        # the guardian would forward TERM, and the command would get it twice
        self._descendants.kill(grace_s=grace_s, unasked=self.pid)
        self._guardian.wait()
        with contextlib.suppress(OSError):  # a second kill finds it closed
            os.close(self._lifeline)
        _reap()


def adopt_orphans() -> None:
    """Become the parent of descendants that lose their own parent; on Linux only, elsewhere this does nothing."""
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
    """Collect adopted children that have ended; otherwise they remain zombies until this process ends."""
    for process in psutil.Process().children():
        if not _alive(process):
            with contextlib.suppress(psutil.Error, psutil.TimeoutExpired):
                process.wait(0)

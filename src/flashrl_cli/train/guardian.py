"""Parent process of the command that flashrl runs: `python -m flashrl_cli.train.guardian LIFELINE COMMAND…`.

LIFELINE is the file descriptor of a pipe's read end; flashrl holds the write end. When flashrl is killed, the pipe
closes, and the guardian ends the command and all its descendants. It adopts orphans, so no process escapes it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from types import FrameType

from flashrl_cli.train.process import Descendants
from flashrl_cli.worker.server import end_with_parent

POLL_S = 0.2
GRACE_S = 10.0
"""Seconds that the command gets to end by itself once flashrl is gone."""


def guard(lifeline: int, argv: list[str]) -> int:
    """Run `argv` and return its exit code (a signal's number negative); end it all when `lifeline` closes."""
    descendants = Descendants()
    # blocked until the handler knows the command; a TERM in between would leave the command behind
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=_prepare)  # noqa: PLW1509 - system calls only

    def pass_on(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    while child.poll() is None:
        closed, _, _ = select.select([lifeline], [], [], POLL_S)
        if closed:
            descendants.kill(grace_s=GRACE_S)
        descendants.note()
    if select.select([lifeline], [], [], 0)[0]:
        descendants.kill()
    return child.returncode


def _prepare() -> None:
    end_with_parent(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def main() -> None:
    """Run the command under guard, and end with its exit code or signal."""
    code = guard(int(sys.argv[1]), sys.argv[2:])
    if code < 0:
        with contextlib.suppress(OSError):  # KILL has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()

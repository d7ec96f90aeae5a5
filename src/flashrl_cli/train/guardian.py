"""Stands between flashrl and the command that it runs: `python -m flashrl_cli.train.guardian LIFELINE COMMAND…`.

LIFELINE is the number of a pipe's reading end whose other end flashrl holds. When flashrl is killed the pipe closes,
and the guardian ends the command with all that it started. It adopts orphans, so nothing escapes it.
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
"""Time that the command gets to end by itself once nobody watches it any more."""


def guard(lifeline: int, argv: list[str]) -> int:
    """Run `argv` and return its exit code (a signal's number negative); ends all of it when `lifeline` closes."""
    descendants = Descendants()
    # blocked until the handler knows the command, or a TERM in between would leave it behind
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
    """Guard the command and end as it ended."""
    code = guard(int(sys.argv[1]), sys.argv[2:])
    if code < 0:
        with contextlib.suppress(OSError):  # KILL has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()

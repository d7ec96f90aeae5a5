"""Parent process of the command that flashrl runs: `python -m flashrl_cli.train.guardian LIFELINE COMMAND…`.

LIFELINE is the file descriptor of a pipe's read end; flashrl holds the write end. When flashrl is killed, the pipe
closes, and the guardian ends the command and all its descendants. It adopts orphans, so no process escapes it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from types import FrameType

from flashrl_cli import contract
from flashrl_cli.train.process import Descendants
from flashrl_cli.worker.server import end_with_parent

FORK_SERVER = "flashrl_cli.plugins.forkserver"
POLL_S = 0.2
GRACE_S = 10.0
"""Seconds that the command gets to end by itself once flashrl is gone."""


def guard(lifeline: int, argv: list[str]) -> int:
    """Run `argv` and return its exit code (a signal's number negative); end it all when `lifeline` closes."""
    descendants = Descendants()
    # blocked until the handler knows the command; a TERM in between would leave the command behind
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    server = start_fork_server() if os.environ.get(contract.ENV_FORK) == "1" else None
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
    if server:
        server.kill()
        server.communicate()
    if select.select([lifeline], [], [], 0)[0]:
        descendants.kill()
    return child.returncode


def start_fork_server(*modules: str) -> subprocess.Popen[bytes]:
    """Start the server of which a run's processes are forks; commands find it by the environment. Linux only.

    Its standard input is its lifeline; it imports `modules`, or those of a run.
    """
    name = f"flashrl-{os.getpid()}-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"\0" + name.encode())
        listener.listen()
        argv = [sys.executable, "-m", FORK_SERVER, str(listener.fileno()), *modules]
        server = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            pass_fds=(listener.fileno(),),
            preexec_fn=_prepare,  # noqa: PLW1509 - system calls only
        )
    os.environ[contract.ENV_SERVER] = name
    return server


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

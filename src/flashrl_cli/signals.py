"""Handling of the signals that end a command, so that it can clean up first.

INT and HUP, which a terminal sends to all its processes, stay ignored if they were ignored when flashrl was started.
This is the usual rule of Unix: `nohup` ignores HUP and a shell ignores INT (for `command &` in a script), so that a
command outlives its terminal. Python does the same for commands that install no handlers. TERM is sent to this very
process, and always ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from flashrl_cli.errors import ExitCode, FlashrlError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, `kill`, and the closing of a terminal."""
_OF_A_TERMINAL = frozenset({signal.SIGINT, signal.SIGHUP})


class Interrupted(FlashrlError):
    """A signal ended the command; the exit code follows from the signal."""

    def __init__(self, number: int, hint: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}", hint=hint)
        self.exit_code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED


def say_if_ignored(say: Callable[[str], None]) -> None:
    """Warn that Ctrl-C has no effect if SIGINT was ignored when a long command was started."""
    if _stays_ignored(signal.SIGINT):
        say(
            "SIGINT was ignored when this command was started, as a shell does for `command &` in a script: "
            f"Ctrl-C will not stop it, `kill {os.getpid()}` will"
        )


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Collect INT, TERM and HUP in a list instead of ending the process.

    INT and HUP may be ignored (see the module's docstring).
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    with _handled(note):
        yield received


@contextlib.contextmanager
def raised(hint: str, say: Callable[[str], None]) -> Iterator[None]:
    """Make INT, TERM and HUP raise Interrupted where the program is, so that open resources are closed in order.

    INT and HUP may be ignored (see the module's docstring); `say` is called with a warning if INT is.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number, hint)

    say_if_ignored(say)
    with _handled(end):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in ENDING if not _stays_ignored(number)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _stays_ignored(number: signal.Signals) -> bool:
    return number in _OF_A_TERMINAL and signal.getsignal(number) == signal.SIG_IGN

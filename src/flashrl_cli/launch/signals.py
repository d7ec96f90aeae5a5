"""Signals that end a run in order instead of killing the process that watches it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from flashrl_cli.errors import ExitCode, FlashrlError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, `kill`, and a terminal that was closed."""


class Interrupted(FlashrlError):
    """A signal ended the run; the exit code is the signal's."""

    def __init__(self, number: int, hint: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}", hint=hint)
        self.exit_code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Collect INT, TERM and HUP in the list it yields, instead of dying of them."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    with _handled(note):
        yield received


@contextlib.contextmanager
def raised(hint: str) -> Iterator[None]:
    """Let INT, TERM and HUP raise Interrupted where the program is, so that what it opened is closed in order."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number, hint)

    with _handled(end):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in ENDING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)

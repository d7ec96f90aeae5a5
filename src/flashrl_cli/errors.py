"""Errors that a user can act on, and the exit code of each.

An error describes what happened and names the one command or key that fixes it. Only `cli.app.main` catches these
errors. Any other exception is a disk error or a bug. `exit_code_of` maps every exception to its exit code, for the
process and for a run's record alike.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


class ExitCode(enum.IntEnum):
    """Exit codes of every flashrl command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    ENVIRONMENT = 3
    NO_MATCH = 4
    THRESHOLD = 5
    INTERNAL = 70
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass(frozen=True, slots=True)
class Location:
    """Where an input was given: a file with a line or row (from 1), or an option with the key that it sets."""

    source: str
    line: int | None = None
    key: str | None = None
    unit: str = ""
    """What `line` counts if it does not count lines: `row`."""

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.source}:{self.unit} {self.line}" if self.unit else f"{self.source}:{self.line}"
        return self.source if self.key is None else f"{self.source} {self.key}"

    def at(self, line: int | None) -> Location:
        """The location of another line in the same file."""
        return replace(self, line=line)


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with an input: what is wrong, where, and how to fix it.

    `where` is the location of the input, or the name of what is wrong (a logger, a node).
    """

    message: str
    where: Location | str | None = None
    hint: str | None = None

    def document(self) -> dict[str, Any]:
        """Plain data for JSON, with the location as text."""
        where = None if self.where is None else str(self.where)
        return {"message": self.message, "where": where, "hint": self.hint}


class FlashrlError(Exception):
    """A failure that the user can act on: its message, the fix, all problems found, and the exit code."""

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str | None = None, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)


class InputError(FlashrlError):
    """Bad arguments, configuration or data (exit 2)."""

    exit_code = ExitCode.USAGE


class EnvironmentNotReady(FlashrlError):
    """This machine cannot do what was asked, or a requested property could not be proven (exit 3)."""

    exit_code = ExitCode.ENVIRONMENT


class NothingMatched(FlashrlError):
    """A pattern matched nothing that can be worked on (exit 4)."""

    exit_code = ExitCode.NO_MATCH


class BelowThreshold(FlashrlError):
    """A score is below the requested threshold, although the measurement itself succeeded (exit 5)."""

    exit_code = ExitCode.THRESHOLD


class RunFailed(FlashrlError):
    """The launched job failed (exit 1)."""

    exit_code = ExitCode.FAILED


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an error concerns a disk, a path or its permissions.

    Such an error has a path, unlike a connection error.
    """
    return isinstance(error, OSError) and bool(error.filename or error.errno == errno.ENOSPC)


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code of a command that `error` ends."""
    if isinstance(error, FlashrlError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if is_of_the_disk(error):
        return ExitCode.ENVIRONMENT
    if isinstance(error, BrokenPipeError):  # as typer does when the reader of stdout has gone
        return ExitCode.FAILED
    return ExitCode.INTERNAL

"""Everything that can go wrong for a user, and the exit code it ends with.

An error describes what happened and names the one command or key that fixes it. Only `cli.app.main` catches these. Any
other exception is an error of the disk or a bug; `exit_code_of` gives the code of each, for the process and for a run's
record alike.
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
    """Where an input was written: a file, with a line or a row (from 1), or an option, with the key that it sets."""

    source: str
    line: int | None = None
    key: str | None = None
    unit: str = ""
    """What `line` counts, where that is not lines: `row`."""

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.source}:{self.unit} {self.line}" if self.unit else f"{self.source}:{self.line}"
        return self.source if self.key is None else f"{self.source} {self.key}"

    def at(self, line: int | None) -> Location:
        """A line of the same file."""
        return replace(self, line=line)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an input: what, where, and the fix.

    `where` is the location in which it was written, or the name of what is wrong (a logger, a node).
    """

    message: str
    where: Location | str | None = None
    hint: str | None = None

    def document(self) -> dict[str, Any]:
        """Plain data for JSON, with the location as text."""
        where = None if self.where is None else str(self.where)
        return {"message": self.message, "where": where, "hint": self.hint}


class FlashrlError(Exception):
    """A failure that the user can act on: what, the fix, every problem found (not the first), and the exit code."""

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
    """This machine cannot do what was asked, or what was asked for was not proven (exit 3)."""

    exit_code = ExitCode.ENVIRONMENT


class NothingMatched(FlashrlError):
    """A pattern named nothing that can be worked on (exit 4)."""

    exit_code = ExitCode.NO_MATCH


class BelowThreshold(FlashrlError):
    """What was judged is below the threshold that was asked for; the judgement itself went well (exit 5)."""

    exit_code = ExitCode.THRESHOLD


class RunFailed(FlashrlError):
    """The launched work failed (exit 1)."""

    exit_code = ExitCode.FAILED


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an error concerns a disk, a path or its permissions: it has a path, unlike one of a connection."""
    return isinstance(error, OSError) and bool(error.filename or error.errno == errno.ENOSPC)


def exit_code_of(error: BaseException) -> ExitCode:
    """The code that a command ends with when `error` ends it."""
    if isinstance(error, FlashrlError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if is_of_the_disk(error):
        return ExitCode.ENVIRONMENT
    if isinstance(error, BrokenPipeError):  # as typer does when the reader of stdout has gone
        return ExitCode.FAILED
    return ExitCode.INTERNAL

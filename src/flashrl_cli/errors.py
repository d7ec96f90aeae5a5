"""Everything that can go wrong for a user, and the exit code it ends with.

An error says what happened and the one command or key that fixes it. Only `cli.app.main` catches these.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


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
class Problem:
    """One thing wrong with an input: what, where (`file:line` or `--set key`), and the fix."""

    message: str
    where: str | None = None
    hint: str | None = None


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


class RunFailed(FlashrlError):
    """The launched work failed (exit 1)."""

    exit_code = ExitCode.FAILED

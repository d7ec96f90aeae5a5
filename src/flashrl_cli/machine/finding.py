"""One line of a diagnosis: its level, the finding and its fix."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flashrl_cli.errors import Problem


class Level(enum.StrEnum):
    """Result of a check: a run can start, can start with a risk, or cannot start."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check; `fix` is the one command, key or variable that fixes the problem."""

    name: str
    level: Level
    text: str
    fix: str | None = None


def ok(name: str, text: str) -> Finding:
    """A check that passed."""
    return Finding(name, Level.OK, text)


def warn(name: str, text: str, fix: str | None = None) -> Finding:
    """A check that found a risk; a run can still start."""
    return Finding(name, Level.WARN, text, fix)


def fail(name: str, text: str, fix: str | None = None) -> Finding:
    """A check that failed: until it is fixed, a run cannot start or would not run as configured."""
    return Finding(name, Level.FAIL, text, fix)


def problems(findings: Iterable[Finding]) -> Iterator[Problem]:
    """The failures among the findings, as Problems of an error."""
    for finding in findings:
        if finding.level is Level.FAIL:
            yield Problem(finding.text, where=finding.name, hint=finding.fix)

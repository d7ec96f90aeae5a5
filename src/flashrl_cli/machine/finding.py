"""One line of a diagnosis: its level, what was found, and what would fix it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flashrl_cli.errors import Problem


class Level(enum.StrEnum):
    """How a check ended: a run can start, can start with a risk, or cannot start."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `fix` is the one command, key or variable that fixes it."""

    name: str
    level: Level
    text: str
    fix: str | None = None


def ok(name: str, text: str) -> Finding:
    """A check that passed."""
    return Finding(name, Level.OK, text)


def warn(name: str, text: str, fix: str | None = None) -> Finding:
    """A check that found a risk; a run can start all the same."""
    return Finding(name, Level.WARN, text, fix)


def fail(name: str, text: str, fix: str | None = None) -> Finding:
    """A check that failed: a run cannot start before it is fixed, or would not run as it is configured."""
    return Finding(name, Level.FAIL, text, fix)


def problems(findings: Iterable[Finding]) -> Iterator[Problem]:
    """The failures among findings, as what an error lists."""
    for finding in findings:
        if finding.level is Level.FAIL:
            yield Problem(finding.text, where=finding.name, hint=finding.fix)

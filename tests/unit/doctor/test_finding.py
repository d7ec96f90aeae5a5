"""Findings become what an error lists."""

from __future__ import annotations

from flashrl_cli.errors import Problem
from flashrl_cli.machine.finding import fail, ok, problems, warn


def test_only_failures_are_problems() -> None:
    found = problems([ok("a", "fine"), fail("b", "broken", "mend it"), warn("c", "odd", "look"), fail("d", "lost")])
    assert list(found) == [Problem("broken", "b", "mend it"), Problem("lost", "d", None)]

"""What lines of verl's and Ray's logs mean: the phases of a start. `causes` tells why a run failed, `tracebacks` where.

The texts are those of verl 0.9.1 and Ray 2.60.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ANSI = re.compile(r"\x1b\[[0-9;]*m")

PHASES = (
    ("[validate_config] All configuration checks passed", "starting Ray"),
    ("Started a local Ray instance", "starting the trainer"),
    ("Connected to Ray cluster", "starting the trainer"),
    ("{'actor_rollout_ref': ", "loading the data"),
    ("worker group kwargs:", "placing the workers"),
    ("create worker group", "loading the policy"),
    ("actor and ref model engine initialized", "starting the rollout engine"),
    ("['serve',", "loading the rollout engine"),
    ("checkpoint engine manager initialized", "loading the checkpoint"),
    ("all initialize finished, ready to fit", "sending weights to the rollout engine"),
    ("Creating file logger at", "sampling responses"),
    ("Training Progress:", "sampling responses"),
)
"""Text in a log line to what is being done from then on, in the order of a start."""

CLOCKS = {
    "starting verl": 600.0,
    "starting Ray": 600.0,
    "starting the trainer": 600.0,
    "loading the data": 1800.0,
    "placing the workers": 1800.0,  # an autoscaler brings machines first; Ray itself waits for ever
    "loading the policy": 1800.0,
    "starting the rollout engine": 600.0,
    "loading the rollout engine": 1800.0,
    "loading the checkpoint": 1800.0,
    "sending weights to the rollout engine": 900.0,
}
"""Longest time of each phase of a start, seconds: some ten times what a large model takes on slow disks."""

ORDER = tuple(dict.fromkeys(phase for _, phase in PHASES))

IDLE_TALK = re.compile(r"engine is not available: |^(\([^)]*\) )?\s+warnings\.warn\(")
"""What every process of verl's says as it starts, of engines that nobody asked for (verl/workers/engine/__init__.py)."""
TOTAL_STEPS = re.compile(r"Total training steps: (\d+)")


def plain(line: str) -> str:
    """A log line without colour codes and trailing white space."""
    return ANSI.sub("", line).rstrip()


def phase_after(line: str, current: str | None = None) -> str | None:
    """What is being done once `line` was logged, or None if the line does not tell.

    None too for what comes before the `current` phase: with several nodes lines are repeated late.
    """
    found = next((phase for text, phase in PHASES if text in line), None)
    if found is None or (current in ORDER and ORDER.index(found) <= ORDER.index(current)):
        return None
    return found


def telling(lines: Iterable[str]) -> list[str]:
    """Lines as `plain` gives them, less empty ones and what is said in every start."""
    return [line for line in map(plain, lines) if line and not IDLE_TALK.search(line)]


def total_steps(line: str) -> int | None:
    """The number of steps that the run will have, where verl tells it."""
    found = TOTAL_STEPS.search(line)
    return int(found[1]) if found else None

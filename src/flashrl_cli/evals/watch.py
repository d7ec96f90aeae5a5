"""When to look for new checkpoints of runs that are still training."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import paths
from flashrl_cli.runs import known
from flashrl_cli.verl.checkpoints import step_name

if TYPE_CHECKING:
    from flashrl_cli.runs.known import Known

POLL_S = 5.0


def looks(patterns: Sequence[str], say: Callable[[str], None], *, poll_s: float = POLL_S) -> Iterator[bool]:
    """Now, and again as long as a run behind the patterns is training, and once when the last has ended.

    Yields whether it goes on after this look.
    """
    told: list[str] = []
    while True:
        running = [run.name for run in behind(patterns) if run.state == "running"]
        if running and running != told:
            say(f"watching {', '.join(running)}: each new checkpoint is evaluated; Ctrl-C ends that, not the training")
            told = running
        yield bool(running)
        if not running:
            return
        time.sleep(poll_s)


def behind(patterns: Sequence[str]) -> list[Known]:
    """Runs whose checkpoints the patterns name, or would name once there are some."""
    wanted = [str(paths.absolute(pattern)) for pattern in patterns]
    return [run for run in known.every() if any(_names(pattern, run.paths.checkpoints) for pattern in wanted)]


def _names(pattern: str, run_checkpoints: Path) -> bool:
    """Whether a glob or path names a run's checkpoints, or what is in or around that folder."""
    inside = run_checkpoints / step_name(0)
    literal = Path(pattern)
    if literal == run_checkpoints or run_checkpoints in literal.parents:
        return True
    return any(fnmatch.fnmatch(str(one), pattern) for one in (inside, *inside.parents))

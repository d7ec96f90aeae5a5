"""Which attempt of a run comes next, and whether the name may be used."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flashrl_cli.config.spec import FOLDER_NAME
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from flashrl_cli.paths import RunPaths


def next_attempt(run: RunPaths, *, resume: str) -> int:
    """Number of the attempt to start; a name that was used before is refused unless it is resumed.

    verl goes on silently where a run of the same name left checkpoints.
    """
    if not re.match(FOLDER_NAME, run.name):
        raise InputError(f"--name {run.name}: not the name of a folder", hint="no slash, and no dot at its start")
    used = run.attempts()
    if resume == "never" and (used or run.checkpoints.exists()):
        raise InputError(
            f"run {run.name} exists already: {run.root if used else run.checkpoints}",
            hint=f"`--resume auto` goes on with it, `--name {run.name}-2` starts another",
        )
    return max(used, default=0) + 1

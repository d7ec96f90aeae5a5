"""Which attempt of a run comes next, and whether the name may be used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from flashrl_cli.config.spec import FOLDER_NAME, RunSpec
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.paths import RunPaths, absolute
from flashrl_cli.verl import checkpoints

RESUME_MODES = "auto|never|PATH"


def resume_path(resume: str) -> Path | None:
    """The `global_step_N` folder that `--resume PATH` names; None for `auto` and `never`. Raises InputError."""
    if resume in ("auto", "never"):
        return None
    path = absolute(resume)
    if not path.is_dir() or checkpoints.step_number(path.name) is None:
        raise InputError(f"--resume {resume}: no folder global_step_N", hint=f"--resume takes {RESUME_MODES}")
    return path


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


def check_resumable(spec: RunSpec, run: RunPaths, resume_from: Path | None) -> None:
    """Raise InputError if the checkpoint that the run would go on from cannot be loaded by as many processes.

    Each trainer process loads the shards of its own rank and world size, or fails in a worker minutes after the start
    (verl/utils/checkpoint/fsdp_checkpoint_manager.py:213).
    """
    step = resume_from or checkpoints.latest_step(run.checkpoints)
    if step is None:
        return
    models = [checkpoints.ACTOR, *([checkpoints.CRITIC] if spec.algorithm.advantage == "gae" else [])]
    problems = [problem for model in models for problem in _unloadable(spec, step / model)]
    if problems:
        raise InputError(f"run {run.name} cannot go on from {step}", problems=problems)


def _unloadable(spec: RunSpec, folder: Path) -> Iterator[Problem]:
    another = "resume from another step: --resume PATH"
    found = checkpoints.shards(folder) if folder.is_dir() else None
    if found is None:
        yield Problem(f"no {folder.name} shards there", str(folder), another)
        return
    if found.missing:
        yield Problem(f"incomplete: {', '.join(found.missing)}", str(folder), another)
    nodes, world = spec.resources.nodes, spec.resources.nodes * spec.resources.gpus_per_node
    if len(found.files) != world:
        saved = len(found.files)
        fix = (
            f"--set resources.gpus_per_node={saved // nodes}"
            if saved % nodes == 0
            else "the resources it was saved with"
        )
        yield Problem(f"saved by {saved} trainer processes, this run has {world}", str(folder), fix)

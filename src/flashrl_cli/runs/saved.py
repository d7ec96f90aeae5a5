"""The steps that a run saved: which of them a resume can read, and moving the others out of its way.

Nothing here imports torch or reads weights: what is torn is found by its list of contents (`weights.torn`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashrl_cli import files
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.hub import hf_problem
from flashrl_cli.verl import checkpoints as layout
from flashrl_cli.weights import torn

SET_ASIDE = ".set_aside"
"""Folder of a run's checkpoints that holds the steps moved out of the way; hidden, so that no pattern meets it."""
DOOMED = ".pruned"
"""Folder of a run's checkpoints in which steps wait for their deletion."""
REASON = "reason.txt"

_DAMAGED = "truncated or damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """One `global_step_N` on disk."""

    step: int
    path: Path
    problems: tuple[str, ...]
    """Each file that a resume would miss, and what is wrong with it; empty for a step that is complete and readable."""
    world_size: int | None
    """Trainer processes that saved it, and that alone can load it."""
    bytes: int
    written: float
    """When its newest file was written, seconds since the epoch."""
    has_hf: bool
    """Whether it holds whole weights in Hugging Face's form too."""
    has_weights: bool
    """Whether the policy's weights are there in either form: enough to evaluate, though maybe not to go on from."""
    tracked: bool
    """Whether it is the one that verl resumes from by itself."""
    lora: bool

    @property
    def complete(self) -> bool:
        """Whether a run can go on from it."""
        return not self.problems


def saved_steps(run_checkpoints: Path, *, critic: bool, loaded: layout.Loaded | None = None) -> list[Saved]:
    """Every step of a run's checkpoints, by number; empty if the folder is not there. See `inspect`."""
    return [inspect(folder, critic=critic, loaded=loaded) for folder in step_folders(run_checkpoints)]


def step_folders(folder: Path) -> list[Path]:
    """Folders `global_step_N` in `folder`, by number; nothing else that lies there. Raises EnvironmentNotReady."""
    with _readable(folder):
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        steps = (step for step in map(layout.step_number, names) if step is not None)
        candidates = [folder / layout.step_name(step) for step in sorted(set(steps))]
        return [path for path in candidates if path.name in names and path.is_dir()]


def inspect(step_folder: Path, *, critic: bool, loaded: layout.Loaded | None = None) -> Saved:
    """What `step_folder` holds, and what a resume would miss there.

    `critic`: the run trains one. `loaded`: what the run loads when it resumes (`verl.checkpoints.loaded`), by default all.
    Raises EnvironmentNotReady for a folder that this user may not read.
    """
    step = layout.step_number(step_folder.name)
    if step is None:
        raise InputError(f"{step_folder} is no folder global_step_N")
    actor = step_folder / layout.ACTOR
    with _readable(step_folder):
        size, written = measure(step_folder)
        has_hf = hf_problem(actor / layout.HUGGINGFACE) is None
        return Saved(
            step=step,
            path=step_folder,
            problems=tuple(_problems(step_folder, loaded or layout.Loaded(), critic=critic)),
            world_size=layout.recorded_world_size(actor),
            bytes=size,
            written=written,
            has_hf=has_hf,
            has_weights=has_hf or not any(_model_problems(step_folder, layout.ACTOR, frozenset({"model"}))),
            tracked=layout.tracked_step(step_folder.parent) == step,
            lora=(actor / layout.LORA).is_file(),
        )


def set_aside(step_folder: Path, why: str) -> Path:
    """Move a step out of its run's way, into `.set_aside` beside it under a name of its own, with the reason; where it is now.

    A rename: nothing is copied, nothing overwritten. Raises EnvironmentNotReady if the file system refuses.
    """
    target = hide(step_folder, step_folder.parent / SET_ASIDE)
    # The reason is worth no failure: a full disk is what cuts checkpoints off in the first place.
    with contextlib.suppress(OSError):
        files.write_text(target / REASON, f"{why}\n")
    return target


def hide(folder: Path, place: Path) -> Path:
    """Rename `folder` into `place` (on the same file system), under a name of its own; where it is now.

    Raises EnvironmentNotReady if the file system refuses.
    """
    try:
        target = _reserve(place, folder.name)
        try:
            folder.rename(target)
        except OSError:
            target.rmdir()
            raise
    except OSError as error:
        raise EnvironmentNotReady(
            f"{folder} cannot be moved to {place}: {error.strerror or error}", hint="move it away yourself"
        ) from None
    return target


def point_tracker(run_checkpoints: Path, step: int | None) -> None:
    """Make verl resume from `step` by itself, or start anew for None.

    Raises InputError if there is no such step: verl would start anew in silence.
    """
    tracker = run_checkpoints / layout.TRACKER
    if step is not None and not (run_checkpoints / layout.step_name(step)).is_dir():
        raise InputError(f"{run_checkpoints} has no {layout.step_name(step)}")
    try:
        if step is None:
            tracker.unlink(missing_ok=True)
        else:
            files.write_text(tracker, str(step))
    except OSError as error:
        raise EnvironmentNotReady(f"{tracker} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentNotReady(f"{folder} cannot be read: {error.strerror or error}") from None


def _problems(step_folder: Path, loaded: layout.Loaded, *, critic: bool) -> Iterator[str]:
    yield from _model_problems(step_folder, layout.ACTOR, loaded.actor)
    if critic:
        yield from _model_problems(step_folder, layout.CRITIC, loaded.critic)
    if problem := torn(step_folder / layout.DATA):
        yield f"{layout.DATA}: {problem}"


def _model_problems(step_folder: Path, name: str, parts: frozenset[str]) -> Iterator[str]:
    """What is wrong in `actor/` or `critic/`, each with the file's name in the step."""
    model = step_folder / name
    if not model.is_dir():
        yield f"{name}/: missing"
        return
    world_size = layout.recorded_world_size(model)
    if world_size is None:
        yield f"{name}/{layout.FSDP_CONFIG}: {_unreadable_json(model / layout.FSDP_CONFIG) or 'names no world size'}"
        found = layout.shards(model)
        world_size = len(found.files) if found else 1
    for file in layout.part_files(model, world_size, (part for part in layout.PARTS if part in parts)):
        if problem := torn(file):
            yield f"{name}/{file.name}: {problem}"
    for relative in (f"{layout.HUGGINGFACE}/{file}" for file in layout.HF_FILES):
        if problem := _unreadable_json(model / relative):
            yield f"{name}/{relative}: {problem}"


def _unreadable_json(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
    except ValueError:
        return _DAMAGED if file.stat().st_size else "empty"
    return None


def measure(folder: Path) -> tuple[int, float]:
    """Bytes of all files in `folder`, links not followed, and when the newest was written; files that vanish do not count."""
    size, newest = 0, folder.stat().st_mtime
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(os.path.join(root, name))
                size, newest = size + found.st_size, max(newest, found.st_mtime)
    return size, newest


def _reserve(folder: Path, name: str) -> Path:
    """A new, empty folder `name`, `name-2`, … in `folder`: renaming a folder over it replaces it, and nothing else."""
    folder.mkdir(exist_ok=True)
    number = 1
    while True:
        target = folder / (name if number == 1 else f"{name}-{number}")
        try:
            target.mkdir()
        except FileExistsError:
            number += 1
        else:
            return target

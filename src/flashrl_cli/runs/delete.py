"""Delete runs, or checkpoints of one run.

What will be deleted is decided and shown first, checked again under the run's lock, and only then deleted. Folders are
renamed into a hidden folder before they are emptied, so that nothing half-deleted has the name of a run or a step. The
next deletion also removes what an interrupted one left there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.runs import store
from flashrl_cli.runs.control import orphan
from flashrl_cli.runs.saved import DOOMED, hide, list_checkpoints, measure, refuse_while_running

if TYPE_CHECKING:
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.saved import CheckpointList, Hidden, Saved
    from flashrl_cli.runs.store import Run

REMOVED = ".removed"
"""Folder beside runs, and beside their checkpoints, in which removed ones wait to be deleted."""
KEEP = "last:3,best:1,every:50"
_RULE = re.compile(r"(last|best|every):([1-9]\d{0,8})")


@dataclass(frozen=True, slots=True)
class Keep:
    """Which steps to keep: a number of the newest, a number of the best, and each that `every` divides."""

    last: int = 0
    best: int = 0
    every: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A step with the reason to keep it; a step without a reason is deleted."""

    saved: Saved
    stays: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """What a prune would do: a verdict on each step, and which hidden folders it would delete."""

    verdicts: tuple[Verdict, ...]
    set_aside: tuple[Hidden, ...] = ()
    leftovers: tuple[Hidden, ...] = ()
    """Folders that an interrupted prune did not delete."""

    @property
    def going(self) -> list[Path]:
        """Folders that would be deleted."""
        hidden = [one.path for one in (*self.set_aside, *self.leftovers)]
        return [verdict.saved.path for verdict in self.verdicts if not verdict.stays] + hidden

    @property
    def freed(self) -> int:
        """Bytes of everything that would be deleted."""
        steps = sum(verdict.saved.bytes for verdict in self.verdicts if not verdict.stays)
        return steps + sum(one.bytes for one in (*self.set_aside, *self.leftovers))

    def document(self) -> dict[str, Any]:
        """The prune as plain data."""
        steps = [{"step": v.saved.step, "stays": list(v.stays), "bytes": v.saved.bytes} for v in self.verdicts]
        return {"steps": steps, "going": [str(path) for path in self.going], "bytes": self.freed}


def parse_keep(text: str) -> Keep:
    """Parse `last:3,best:1,every:50`, in any order and each at most once. Raises InputError."""
    rules = [_RULE.fullmatch(part.strip()) for part in text.split(",")]
    found = {rule[1]: int(rule[2]) for rule in rules if rule}
    if len(found) != len(rules):
        raise InputError(f"--keep {text}: not understood", hint=f"--keep {KEEP}, or some of it, with numbers from 1 on")
    return Keep(**found)


def plan_prune(listed: CheckpointList, keep: Keep | None, *, set_aside: bool) -> Prune:
    """Decide what to delete: no step without `keep`, and with `set_aside` all superseded steps.

    The newest complete step, the best one, and the one that verl resumes from are always kept.
    """
    last = [one.step for one in listed.saved if one.complete][-keep.last :] if keep and keep.last else []
    best = listed.scores.ranked()[: keep.best] if keep and listed.scores else []
    if keep and listed.newest is None and listed.saved:
        raise InputError(
            f"no step of run {listed.run.name} is complete, so none is deleted",
            hint=f"`flashrl runs checkpoints {listed.run.name}` says what each lacks",
        )
    verdicts = [Verdict(one, tuple(_reasons(listed, one, keep, last, best))) for one in listed.saved]
    return Prune(
        verdicts=tuple(verdicts),
        set_aside=listed.set_aside if set_aside else (),
        leftovers=listed.leftovers,
    )


def prune(run: RunPaths, keep: Keep | None, *, set_aside: bool, shown: Prune) -> None:
    """Delete what `shown` lists.

    Raises InputError if the run is running, or if its checkpoints have changed since `shown` was made.

    The run's lock is held while steps are renamed, but not while they are deleted, which may take minutes.
    """
    with store.locked(run):
        refuse_while_running(run, "nothing is deleted")
        if plan_prune(list_checkpoints(run), keep, set_aside=set_aside).going != shown.going:
            raise InputError(f"the checkpoints of run {run.name} changed meanwhile; nothing is deleted")
        waiting = [one.path for one in shown.leftovers]
        doomed = [*(hide(path, run.checkpoints / DOOMED) for path in shown.going if path not in waiting), *waiting]
    _delete(doomed)
    with contextlib.suppress(OSError):  # another prune may be working there
        (run.checkpoints / DOOMED).rmdir()


def _reasons(listed: CheckpointList, one: Saved, keep: Keep | None, last: list[int], best: list[int]) -> Iterator[str]:
    if one.path.is_symlink():
        yield "a link"
    if keep is None:
        yield "steps are not pruned without --keep"
        return
    if one.step == listed.newest:
        yield "newest"
    elif one.step in last:
        yield f"last:{keep.last}"
    if one.step == listed.best and listed.scores:
        yield f"best by {listed.scores.by}"
    elif one.step in best:
        yield f"best:{keep.best}"
    if one.tracked:
        yield "verl goes on from it"
    if keep.every and one.has_weights and one.step % keep.every == 0:
        yield f"every:{keep.every}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """Folders of one run that would be deleted, with their bytes; `checkpoints` is None if none would be."""

    run: Run
    root: Path
    root_bytes: int
    checkpoints: Path | None
    checkpoint_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that would be freed."""
        return self.root_bytes + self.checkpoint_bytes

    @property
    def warning(self) -> str | None:
        """A warning about processes that may still write to these folders, as far as they can be seen from here."""
        command = orphan(self.run.last) if self.run.last else None
        return f"the Ray job of {self.run.name} may still run: `{shlex.join(command)}` ends it" if command else None

    def document(self) -> dict[str, Any]:
        """The removal as plain data."""
        checkpoints = str(self.checkpoints) if self.checkpoints else None
        return {"name": self.run.name, "run": str(self.root), "checkpoints": checkpoints, "bytes": self.bytes}


def plan_removal(name: str, *, keep_checkpoints: bool = False) -> Removal:
    """What removing the run `name` would delete. Raises InputError if it runs, or if a folder is not its own."""
    run = store.find(name)
    _check_ended(run)
    root = run.paths.root
    if root.is_symlink():
        raise InputError(f"{root} is a link to {root.resolve()}", hint="remove the link and what it points to yourself")
    checkpoints = None if keep_checkpoints else run.paths.checkpoints
    if checkpoints is not None and os.path.lexists(checkpoints):
        _check_own(run, checkpoints)
    else:
        checkpoints = None
    return Removal(
        run=run,
        root=root,
        root_bytes=measure(root)[0],
        checkpoints=checkpoints,
        checkpoint_bytes=measure(checkpoints)[0] if checkpoints else 0,
    )


def remove(removal: Removal) -> None:
    """Delete what was planned. Raises InputError if the run was restarted meanwhile, or a folder cannot be removed.

    Checkpoints are removed first: if this is killed at any point, the run either still exists with its record or not at
    all.
    """
    folders = [folder for folder in (removal.checkpoints, removal.root) if folder is not None]
    try:
        with store.locked(removal.run.paths):
            _check_ended(store.find(removal.run.name))
            hidden = [hide(folder, folder.parent / REMOVED) for folder in folders]
        _delete(hidden)
    except EnvironmentNotReady as error:
        raise InputError(f"{removal.run.name} could not be removed: {error.message}", hint=error.hint) from None
    for folder in folders:
        _sweep(folder.parent)


def _sweep(parent: Path) -> None:
    """Delete what interrupted removals left in `parent`, and a project folder without runs."""
    for left in parent.glob(f"{REMOVED}*"):
        shutil.rmtree(left, ignore_errors=True)
    if parent.parent == paths.checkpoints_root():
        with contextlib.suppress(OSError):
            parent.rmdir()


def _check_ended(run: Run) -> None:
    if run.state in (None, "lost") and (worker := _worker(run.paths.root)):
        raise InputError(f"process {worker} still works in {run.paths.root}", hint="end it, or wait until it has ended")
    if run.state == "running":
        where = f" on {run.last.host}" if run.last and not _here(run) else ""
        raise InputError(f"run {run.name} is running{where}", hint=f"flashrl runs stop {shlex.quote(run.name)}")


def _worker(root: Path) -> str | None:
    """Number and name of a process whose working folder is inside `root`, as verl's is; None if there is none."""
    import psutil

    for process in psutil.process_iter(["pid", "name", "cwd"]):
        cwd = process.info["cwd"]
        if cwd and Path(cwd).is_relative_to(root.resolve()) and process.pid != os.getpid():
            return f"{process.pid} ({process.info['name']})"
    return None


def _here(run: Run) -> bool:
    return run.last is not None and run.last.host == store.own_process()["host"]


def _check_own(run: Run, folder: Path) -> None:
    """Raise InputError unless `folder` is `<project>/<run>` of this run and holds nothing else of value."""
    kept = {Path.home(), Path.cwd(), paths.runs_root(), paths.checkpoints_root(), paths.data_root(), run.paths.root}
    real = folder.resolve()
    own = folder.is_absolute() and folder.name == run.name and not folder.is_symlink() and folder.is_dir()
    if run.record:
        own = own and folder.parent.name == run.record.project
    if not own or any(place.resolve().is_relative_to(real) for place in kept):
        raise InputError(
            f"{folder}, where the checkpoints of {run.name} should be, is not a folder of its own",
            hint="--keep-checkpoints removes the run's record alone",
        )


def _delete(folders: list[Path]) -> None:
    """Delete hidden folders. Raises EnvironmentNotReady."""
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:  # another command is deleting it at the same time
            shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            raise EnvironmentNotReady(
                f"{error.filename} cannot be deleted: {error.strerror}", hint="try again once it can"
            ) from None

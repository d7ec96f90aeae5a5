"""Remove runs with their checkpoints: what would go is told first, and nothing else can go.

Folders are renamed to hidden names before they are emptied, checkpoints first: whenever it is killed, a run is there with its
record or not there at all, and what was left is removed by the next removal.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrl_cli import paths
from flashrl_cli.errors import InputError
from flashrl_cli.runs import record
from flashrl_cli.runs.known import Known, check_name, known
from flashrl_cli.runs.sizes import size
from flashrl_cli.runs.stopping import orphan

HIDDEN = ".removed-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """Folders of one run that would go, with their bytes; `checkpoints` is None where none go."""

    run: Known
    root: Path
    root_bytes: int
    checkpoints: Path | None
    checkpoint_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All that would be freed."""
        return self.root_bytes + self.checkpoint_bytes

    @property
    def warning(self) -> str | None:
        """What may still write to these folders, as far as can be told from here."""
        command = orphan(self.run.last) if self.run.last else None
        return f"the Ray job of {self.run.name} may still run: `{shlex.join(command)}` ends it" if command else None

    def document(self) -> dict[str, Any]:
        """For programs."""
        checkpoints = str(self.checkpoints) if self.checkpoints else None
        return {"name": self.run.name, "run": str(self.root), "checkpoints": checkpoints, "bytes": self.bytes}


def plan(name: str, *, keep_checkpoints: bool = False) -> Removal:
    """What removing the run called `name` would remove. Raises InputError if it runs, or if a folder is not its own."""
    check_name(name)
    run = known(name)
    _check_ended(run)
    root = run.paths.root
    if root.is_symlink():
        raise InputError(f"{root} is a link to {root.resolve()}", hint="remove the link and what it points to yourself")
    checkpoints = None if keep_checkpoints else run.paths.checkpoints
    if checkpoints is not None and os.path.lexists(checkpoints):
        _check_own(run, checkpoints)
        return Removal(
            run=run,
            root=root,
            root_bytes=size(root),
            checkpoints=checkpoints,
            checkpoint_bytes=size(checkpoints),
        )
    return Removal(run=run, root=root, root_bytes=size(root), checkpoints=None)


def remove(removal: Removal) -> None:
    """Remove what was planned. Raises InputError if the run was started again meanwhile, or a folder cannot be removed."""
    folders = [folder for folder in (removal.checkpoints, removal.root) if folder is not None]
    try:
        with record.locked(removal.run.paths):
            _check_ended(known(removal.run.name))
            hidden = [_hide(folder) for folder in folders]
        for folder in hidden:
            shutil.rmtree(folder)
    except OSError as error:
        raise InputError(
            f"{removal.run.name} could not be removed: {error}", hint="mend that, and remove it again"
        ) from None
    for folder in folders:
        _sweep(folder.parent)


def _hide(folder: Path) -> Path:
    hidden = folder.with_name(f"{HIDDEN}{folder.name}-{os.getpid()}")
    folder.rename(hidden)
    return hidden


def _sweep(parent: Path) -> None:
    """Remove what killed removals left there; a project without runs goes too."""
    for left in parent.glob(f"{HIDDEN}*"):
        shutil.rmtree(left, ignore_errors=True)
    if parent.parent == paths.checkpoints_root():
        with contextlib.suppress(OSError):
            parent.rmdir()


def _check_ended(run: Known) -> None:
    if run.state in (None, "lost") and (worker := _worker(run.paths.root)):
        raise InputError(f"process {worker} still works in {run.paths.root}", hint="end it, or wait until it has ended")
    if run.state == "running":
        where = f" on {run.last.host}" if run.last and not _here(run) else ""
        raise InputError(f"run {run.name} is running{where}", hint=f"flashrl runs stop {shlex.quote(run.name)}")


def _worker(root: Path) -> str | None:
    """A process whose working folder lies in `root`, as verl's does: number and name. None without one."""
    import psutil

    for process in psutil.process_iter(["pid", "name", "cwd"]):
        cwd = process.info["cwd"]
        if cwd and Path(cwd).is_relative_to(root.resolve()) and process.pid != os.getpid():
            return f"{process.pid} ({process.info['name']})"
    return None


def _here(run: Known) -> bool:
    return run.last is not None and run.last.host == record.own_process()["host"]


def _check_own(run: Known, folder: Path) -> None:
    """Raise InputError unless `folder` is `<project>/<run>` of this run and holds nothing else of value."""
    kept = {Path.home(), Path.cwd(), paths.runs_root(), paths.checkpoints_root(), paths.data_root(), run.paths.root}
    real = folder.resolve()
    own = folder.is_absolute() and folder.name == run.name and not folder.is_symlink() and folder.is_dir()
    if run.record:
        own = own and folder.parent.name == run.record.project
    if not own or any(place.resolve().is_relative_to(real) for place in kept):
        raise InputError(
            f"{folder}, where the checkpoints of {run.name} should lie, is not a folder of its own",
            hint="--keep-checkpoints removes the run's record alone",
        )

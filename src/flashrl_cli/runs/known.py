"""Runs on disk as they are: with a record, with a damaged one, or from before there were records."""

from __future__ import annotations

import contextlib
import difflib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from flashrl_cli import paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import record, recorded

if TYPE_CHECKING:
    from flashrl_cli.paths import AttemptPaths
    from flashrl_cli.runs.record import Attempt, RunRecord, Status

_NEAR = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A run's folder and what is known of it. `damage` says why there is no record although there is a file."""

    paths: RunPaths
    record: RunRecord | None
    damage: str | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self.paths.name

    @property
    def last(self) -> Attempt | None:
        """The newest attempt in the record."""
        return self.record.last if self.record else None

    @property
    def state(self) -> Status | None:
        """State of the newest attempt; None where no record tells."""
        return record.state(self.last) if self.last else None

    def logged(self) -> tuple[int, AttemptPaths] | None:
        """The newest attempt that logged metrics, with its number."""
        for number in reversed(self.paths.attempts()):
            files = self.paths.attempt(number)
            if files.metrics.is_file() and files.metrics.stat().st_size:
                return number, files
        return None

    def plan(self, number: int) -> dict[str, Any] | None:
        """The plan that attempt `number` executed; None where it is missing or unreadable."""
        return _plan(self.paths.attempt(number).plan)

    def setting(self, number: int, *keys: str) -> Any:
        """A value of the preset that attempt `number` was started with; None where its plan does not tell."""
        value: Any = (self.plan(number) or {}).get("spec")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def known(name: str) -> Known:
    """The run called `name`. Raises InputError for what is no run's name, NothingMatched (with near names) for no run."""
    check_name(name)
    root = paths.runs_root() / name
    if not root.is_dir():
        names = recorded.run_names()
        near = difflib.get_close_matches(name, names, _NEAR)
        listed = f"did you mean {', '.join(near)}?" if near else "`flashrl runs ls` lists the runs"
        hint = listed if names else f"FLASHRL_RUNS names another folder than {paths.runs_root()}"
        raise NothingMatched(f"no run {name} in {paths.runs_root()}", hint=hint)
    return _of(root)


def check_name(name: str) -> None:
    """Raise InputError unless `name` can be a run's: one visible folder."""
    import re

    from flashrl_cli.config.spec import FOLDER_NAME

    if not re.match(FOLDER_NAME, name):
        raise InputError(
            f"{name!r} is not the name of a run", hint="give its name alone, as `flashrl runs ls` shows it"
        )


def every() -> list[Known]:
    """All runs in the runs folder, by name."""
    return [_of(paths.runs_root() / name) for name in recorded.run_names()]


def _of(root: Path) -> Known:
    found, damage = None, None
    try:
        found = record.load(root / "run.json")
        if found:
            _check(found)
    except (InputError, OSError) as error:
        found, damage = None, str(error)
    except (TypeError, ValueError) as error:
        found, damage = None, f"{root / 'run.json'} is no run record: {error}"
    name = root.name
    checkpoints = Path(found.checkpoints) if found else _checkpoints(RunPaths(name, root, root))
    return Known(paths=RunPaths(name, root, checkpoints), record=found, damage=damage)


def _check(found: RunRecord) -> None:
    """Raise ValueError or TypeError where values of a record are of another kind than the rest of flashrl counts on."""
    Path(found.checkpoints)
    for attempt in found.attempts:
        times = [attempt.started, attempt.updated, *(phase.began for phase in attempt.phases)]
        for time in [*times, *([attempt.ended] if attempt.ended is not None else [])]:
            if datetime.fromisoformat(time).tzinfo is None:
                raise ValueError(f"time without a zone: {time}")
        numbers = (attempt.number, attempt.pid, attempt.pid_started)
        if attempt.status not in get_args(record.Status) or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError(f"attempt {attempt.number} holds values that mean nothing")


def _checkpoints(run: RunPaths) -> Path:
    """Folder of checkpoints of a run without a record: its newest plan's, or the one project's that has such a folder."""
    for number in reversed(run.attempts()):
        plan = _plan(run.attempt(number).plan)
        if plan and isinstance(told := plan["files"].get("checkpoints"), str):
            return Path(told)
    found = sorted(paths.checkpoints_root().glob(f"*/{_literal(run.name)}"))
    return found[0] if len(found) == 1 else paths.checkpoints_root() / "unknown" / run.name


def _literal(name: str) -> str:
    import glob

    return glob.escape(name)


def _plan(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(InputError, OSError):
        return recorded.read_plan(path)
    return None

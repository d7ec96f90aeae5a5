"""Plans on disk: what an attempt was really started with, found by the names that people have for it.

The record of a run, `runs/<name>/run.json`: what was started when, from what, by which attempt, and how it ended.

Written by the process that supervises an attempt; every change goes through `change`, which locks, reads, and replaces the
file whole. An attempt's entry is never removed by a later attempt.

Runs on disk as they are: with a record, with a damaged one, or from before there were records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from flashrl_cli import files, paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.paths import RunPaths

if TYPE_CHECKING:
    from flashrl_cli.paths import AttemptPaths

SCHEMA_VERSION = 1
LOCK_TIMEOUT_S = 30.0

Status = Literal["running", "done", "failed", "stopped", "lost"]
"""`lost` is never written: it is what a `running` attempt is whose process is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Something that an attempt did before its first step, and when it began (ISO 8601, UTC)."""

    name: str
    began: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a run. Times are ISO 8601 in UTC, steps are training steps, `None` is not known (yet)."""

    number: int
    status: Status
    started: str
    updated: str
    """When this entry was last renewed: at each phase, each step, and the end."""
    ended: str | None = None
    exit_code: int | None = None
    error: str | None = None
    """Why it failed, one line."""
    hint: str | None = None
    host: str = ""
    pid: int = 0
    """The supervising flashrl process on `host`."""
    pid_started: float = 0.0
    """When that process started, seconds since the epoch: a pid alone may be another process's by now."""
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    job_id: str | None = None
    argv: tuple[str, ...] = ()
    """The flashrl command line."""
    plan_hash: str = ""
    """SHA-256 of what the plan trains: see `launch.changes`."""
    resumed_from: int | None = None
    """Step of the checkpoint that it went on from."""
    last_step: int | None = None
    total_steps: int | None = None
    phases: tuple[Phase, ...] = ()
    proof: tuple[Mapping[str, Any], ...] = ()
    """The rollout workers' handshakes (`contract.Handshake` as data)."""
    set_aside: tuple[str, ...] = ()
    """Checkpoints that this attempt moved out of the way before it started, and why."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    git: Mapping[str, Any] | None = None
    """State of the repository that flashrl was called in: commit, branch, dirty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """All attempts of one run, in order."""

    name: str
    project: str
    preset: str
    created: str
    checkpoints: str
    """Folder of its `global_step_N`."""
    attempts: tuple[Attempt, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def last(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None


def now() -> str:
    """This moment as the record writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def load(path: Path) -> RunRecord | None:
    """The record in `path` (a run.json); None if there is none. Raises InputError for a damaged or a newer one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["schema_version"]
        if version == SCHEMA_VERSION:
            return _record(data)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no run record: {error}", hint="move it away; a new one is written") from None
    raise InputError(f"{path}: record of schema version {version}, this flashrl reads {SCHEMA_VERSION}")


def change(run: RunPaths, edit: Callable[[RunRecord | None], RunRecord]) -> RunRecord:
    """Replace the record of `run` by what `edit` makes of it, while no other process does the same."""
    with locked(run):
        record = edit(load(run.record))
        files.write_json(run.record, dataclasses.asdict(record))
    return record


def renew(run: RunPaths, number: int, **changes: Any) -> None:
    """Set fields of attempt `number`, and when it was renewed. An attempt that is not in the record stays so."""

    def edit(record: RunRecord | None) -> RunRecord:
        if record is None:
            raise InputError(f"{run.record} is gone while the run goes on")
        attempts = tuple(
            dataclasses.replace(attempt, updated=now(), **changes) if attempt.number == number else attempt
            for attempt in record.attempts
        )
        return dataclasses.replace(record, attempts=attempts)

    change(run, edit)


@contextlib.contextmanager
def locked(run: RunPaths) -> Iterator[None]:
    """Hold the run's lock; raises InputError if another process keeps it for half a minute."""
    from filelock import FileLock, Timeout

    run.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(run.root / ".lock", timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise InputError(f"{run.root} is locked by another flashrl process", hint="try again") from None


def state(attempt: Attempt) -> Status:
    """What an attempt is now: `running` only as long as its process lives. Another machine's is believed."""
    if attempt.status != "running" or attempt.host != socket.gethostname():
        return attempt.status
    return "running" if is_alive(attempt.pid, attempt.pid_started) else "lost"


def is_alive(pid: int, started: float) -> bool:
    """Whether the process `pid` that started at `started` (seconds since the epoch) still runs on this machine."""
    import psutil

    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def own_process() -> dict[str, Any]:
    """Fields of an attempt that say which process this is."""
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "pid_started": psutil.Process().create_time()}


def _record(data: dict[str, Any]) -> RunRecord:
    return RunRecord(**{**data, "attempts": tuple(map(_attempt, data["attempts"]))})


def _attempt(data: dict[str, Any]) -> Attempt:
    phases = tuple(Phase(**phase) for phase in data["phases"])
    lists = {name: tuple(data[name]) for name in ("argv", "proof", "set_aside")}
    return Attempt(**{**data, **lists, "phases": phases})


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
        return state(self.last) if self.last else None

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
        names = run_names()
        near = difflib.get_close_matches(name, names, _NEAR)
        listed = f"did you mean {', '.join(near)}?" if near else "`flashrl runs ls` lists the runs"
        hint = listed if names else f"FLASHRL_RUNS names another folder than {paths.runs_root()}"
        raise NothingMatched(f"no run {name} in {paths.runs_root()}", hint=hint)
    return _of(root)


def check_name(name: str) -> None:
    """Raise InputError unless `name` can be a run's: one visible folder."""
    import re

    from flashrl_cli.paths import FOLDER_NAME

    if not re.match(FOLDER_NAME, name):
        raise InputError(
            f"{name!r} is not the name of a run", hint="give its name alone, as `flashrl runs ls` shows it"
        )


def every() -> list[Known]:
    """All runs in the runs folder, by name."""
    return [_of(paths.runs_root() / name) for name in run_names()]


def _of(root: Path) -> Known:
    found, damage = None, None
    try:
        found = load(root / "run.json")
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
        if attempt.status not in get_args(Status) or not all(isinstance(n, int | float) for n in numbers):
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
        return read_plan(path)
    return None


PLAN_VERSION = 1
"""`schema_version` of the plans that are written and read."""


def run_names() -> list[str]:
    """Names of the runs on disk, sorted; reads folder names only."""
    root = paths.runs_root()
    return sorted(path.name for path in root.glob("[!.]*") if path.is_dir())


def find_plan(reference: str) -> Path | None:
    """A plan's file: itself, an attempt's, or that of a run's newest attempt; paths may start in the runs folder."""
    for place in (paths.absolute(reference), paths.absolute(paths.runs_root() / reference)):
        if place.is_file() and place.suffix == ".json":
            return place
        run = paths.RunPaths(place.name, place, place)
        attempts = [paths.AttemptPaths(place), *(run.attempt(number) for number in reversed(run.attempts()))]
        found = next((attempt.plan for attempt in attempts if attempt.plan.is_file()), None)
        if found:
            return found
    return None


def read_plan(path: Path) -> dict[str, Any]:
    """The plan's document (`plan.plan_document`). Raises InputError when the file is none, or another version's."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", hint="give a run's folder or its plan.json") from None
    if not isinstance(document, dict) or not {"schema_version", "overrides", "env", "files"} <= document.keys():
        raise InputError(f"{path} is not a launch plan", hint="give a run's folder or its plan.json")
    if document["schema_version"] != PLAN_VERSION:
        version = document["schema_version"]
        raise InputError(f"{path}: plan of schema version {version}, this flashrl reads {PLAN_VERSION}")
    return document

"""One run on disk: its record, its folders, and the plans of its attempts.

The record, `runs/<name>/run.json`, holds when each attempt was started, from what, and how it ended. The process that
supervises an attempt writes it; every change goes through `change`, which locks the run, reads the record and replaces
the file. An attempt's entry is never removed by a later attempt.

Code that shows, follows, stops or deletes a run reads it with `find`, `all_runs` or `read_run`, which also accept a
damaged record or none (runs that are older than records). Code that trains a run reads the record alone, with `load`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from flashrl_cli import files, paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.paths import AttemptPaths, RunPaths

SCHEMA_VERSION = 1
LOCK_TIMEOUT_S = 30.0
PLAN_VERSION = 1
"""`schema_version` of plans."""
_NEAR = 3
"""Number of similar names that are suggested for an unknown one."""

Status = Literal["running", "done", "failed", "stopped", "lost"]
"""State of an attempt. `lost` is never written: it is the state of a `running` attempt whose process has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of an attempt before its first step, and when it began (ISO 8601, UTC)."""

    name: str
    began: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a run. Times are ISO 8601 in UTC, steps are training steps, None means not known (yet)."""

    number: int
    status: Status
    started: str
    updated: str
    """When this entry was last updated: at each phase, at each step, and at the end."""
    ended: str | None = None
    exit_code: int | None = None
    error: str | None = None
    """Why the attempt failed, in one line."""
    hint: str | None = None
    host: str = ""
    pid: int = 0
    """Process id of the supervising flashrl process on `host`."""
    pid_started: float = 0.0
    """When that process started, in seconds since the epoch: the pid alone may have been reused."""
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    job_id: str | None = None
    argv: tuple[str, ...] = ()
    """The flashrl command line."""
    plan_hash: str = ""
    """SHA-256 of the settings that determine what the plan trains (`train.launch.plan_hash`)."""
    resumed_from: int | None = None
    """Step of the checkpoint that the attempt resumed from."""
    last_step: int | None = None
    total_steps: int | None = None
    phases: tuple[Phase, ...] = ()
    proof: tuple[Mapping[str, Any], ...] = ()
    """The rollout workers' handshakes (`contract.Handshake` as data)."""
    set_aside: tuple[str, ...] = ()
    """Superseded checkpoints that this attempt moved out of its way before it started, with the reasons."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reward: Mapping[str, str] | None = None
    """The user's reward function and the SHA-256 of its file, of which the attempt's folder has a copy."""
    git: Mapping[str, Any] | None = None
    """State of the git repository that flashrl was called in: commit, branch, dirty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """All attempts of one run, in order."""

    name: str
    project: str
    preset: str
    created: str
    checkpoints: str
    """Folder that contains the run's `global_step_N`."""
    attempts: tuple[Attempt, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def last(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None


def now() -> str:
    """The current time in the format of the record."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def load(path: Path) -> RunRecord | None:
    """Read the record at `path` (a run.json); None if there is none. Raises InputError if it is damaged or newer."""
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
    """Replace the record of `run` by the result of `edit`, under the run's lock."""
    with locked(run):
        record = edit(load(run.record))
        files.write_json(run.record, dataclasses.asdict(record))
    return record


def renew(run: RunPaths, number: int, **changes: Any) -> None:
    """Update fields of attempt `number`, and the time of the update; an attempt that the record lacks is not added."""

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
    """Hold the run's lock; raises InputError if another process holds it for half a minute."""
    from filelock import FileLock, Timeout

    run.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(run.root / ".lock", timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise InputError(f"{run.root} is locked by another flashrl process", hint="try again") from None


def state(attempt: Attempt) -> Status:
    """The attempt's state now: `lost` for a `running` one whose process has ended, as far as this machine can see."""
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
    """Fields of an attempt that identify the current process."""
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "pid_started": psutil.Process().create_time()}


def _record(data: dict[str, Any]) -> RunRecord:
    return RunRecord(**{**data, "attempts": tuple(map(_attempt, data["attempts"]))})


def _attempt(data: dict[str, Any]) -> Attempt:
    phases = tuple(Phase(**phase) for phase in data["phases"])
    lists = {name: tuple(data[name]) for name in ("argv", "proof", "set_aside")}
    return Attempt(**{**data, **lists, "phases": phases})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run on disk: its folders, and its record as far as it can be read.

    `damage` says why the record is missing although its file exists.
    """

    paths: RunPaths
    record: RunRecord | None
    damage: str | None = None

    @property
    def name(self) -> str:
        """The run's name, which is the name of its folder."""
        return self.paths.name

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Attempts in the record, in order; empty without a record."""
        return self.record.attempts if self.record else ()

    @property
    def last(self) -> Attempt | None:
        """The newest attempt in the record."""
        return self.attempts[-1] if self.attempts else None

    @property
    def state(self) -> Status | None:
        """State of the newest attempt; None without a record."""
        return state(self.last) if self.last else None

    def logged(self) -> int | None:
        """Number of the newest attempt that logged metrics."""
        for number in reversed(self.paths.attempts()):
            metrics = self.paths.attempt(number).metrics
            if metrics.is_file() and metrics.stat().st_size:
                return number
        return None

    def plan(self, number: int) -> dict[str, Any] | None:
        """The plan that attempt `number` executed; None if it is missing or unreadable."""
        with contextlib.suppress(InputError, OSError):
            return read_plan(self.paths.attempt(number).plan)
        return None

    def setting(self, number: int, *keys: str) -> Any:
        """A value of the preset in the plan of attempt `number`; None if there is no such plan or value."""
        value: Any = (self.plan(number) or {}).get("spec")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def recorded_paths(self) -> RunPaths:
        """The run's folders as its record names them.

        Raises InputError without a record, or if the checkpoint folder is not the run's own.

        The checkpoint folder has the run's name, so that a damaged record that names `/` or a home folder is refused.
        """
        if self.record is None:
            raise InputError(
                f"run {self.name} has no record that names its checkpoints: {self.damage or 'it is older'}",
                hint=f"`flashrl runs show {self.name}` shows what its folders hold",
            )
        folder = self.paths.checkpoints
        if not folder.is_absolute() or folder.name != self.record.name or ".." in folder.parts:
            raise InputError(
                f"the record of run {self.name} names a folder of checkpoints that is not its own: "
                f"{self.record.checkpoints or 'none'}",
                hint=f"its name must be {self.record.name}: correct it in {self.paths.record}",
            )
        return self.paths


def find(name: str) -> Run:
    """Find the run called `name`.

    Raises InputError if `name` is not a valid name, NothingMatched (with similar names) if there is no such run.
    """
    if not re.match(paths.FOLDER_NAME, name):
        raise InputError(
            f"{name!r} is not the name of a run", hint="give its name alone, as `flashrl runs ls` shows it"
        )
    root = paths.runs_root() / name
    if not root.is_dir():
        names = run_names()
        near = difflib.get_close_matches(name, names, _NEAR)
        listed = f"did you mean {', '.join(near)}?" if near else "`flashrl runs ls` lists the runs"
        hint = listed if names else f"FLASHRL_RUNS names another folder than {paths.runs_root()}"
        raise NothingMatched(f"no run {name} in {paths.runs_root()}", hint=hint)
    return read_run(root)


def all_runs() -> list[Run]:
    """All runs in the runs folder, by name."""
    return [read_run(paths.runs_root() / name) for name in run_names()]


def run_names() -> list[str]:
    """Names of the runs on disk, sorted; reads folder names only."""
    root = paths.runs_root()
    return sorted(path.name for path in root.glob("[!.]*") if path.is_dir())


def read_run(root: Path) -> Run:
    """The run whose folder is `root`, whatever its state; the folder may be missing."""
    found, damage = None, None
    try:
        found = load(root / "run.json")
        if found:
            _check(found)
    except (InputError, OSError) as error:
        found, damage = None, str(error)
    except (TypeError, ValueError) as error:
        found, damage = None, f"{root / 'run.json'} is no run record: {error}"
    run = RunPaths(root.name, root, root)
    checkpoints = Path(found.checkpoints) if found else _checkpoints_by_plan(run)
    return Run(paths=dataclasses.replace(run, checkpoints=checkpoints), record=found, damage=damage)


def _check(found: RunRecord) -> None:
    """Raise ValueError or TypeError for a record whose values have unexpected types."""
    Path(found.checkpoints)
    for attempt in found.attempts:
        times = [attempt.started, attempt.updated, *(phase.began for phase in attempt.phases)]
        for time in [*times, *([attempt.ended] if attempt.ended is not None else [])]:
            if datetime.fromisoformat(time).tzinfo is None:
                raise ValueError(f"time without a zone: {time}")
        numbers = (attempt.number, attempt.pid, attempt.pid_started)
        if attempt.status not in get_args(Status) or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError(f"attempt {attempt.number} holds values that mean nothing")


def _checkpoints_by_plan(run: RunPaths) -> Path:
    """Checkpoint folder of a run without a record: the one in its newest plan, or the only one of its name."""
    with contextlib.suppress(InputError, OSError):
        named = newest_plan(run).get("files", {}).get("checkpoints")
        if isinstance(named, str):
            return Path(named)
    found = sorted(paths.checkpoints_root().glob(f"*/{glob.escape(run.name)}"))
    return found[0] if len(found) == 1 else paths.checkpoints_root() / "unknown" / run.name


def newest_plan(run: RunPaths) -> dict[str, Any]:
    """The newest plan that an attempt of the run left; empty if there is none. Raises InputError like `read_plan`."""
    file = _newest_plan_file(run)
    return read_plan(file) if file else {}


def find_plan(reference: str) -> Path | None:
    """Path of a plan.json: itself, an attempt's, or a run's newest one; paths may be relative to the runs folder."""
    for place in (paths.absolute(reference), paths.absolute(paths.runs_root() / reference)):
        if place.is_file() and place.suffix == ".json":
            return place
        own = AttemptPaths(place).plan
        if file := own if own.is_file() else _newest_plan_file(RunPaths(place.name, place, place)):
            return file
    return None


def read_plan(path: Path) -> dict[str, Any]:
    """Read a plan's document (`train.plan.plan_document`).

    Raises InputError if the file is not a plan, or one of another version.
    """
    hint = "a plan is the plan.json of a run's attempt; move a damaged one away"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", hint=hint) from None
    if not isinstance(document, dict) or not {"schema_version", "overrides", "env", "files"} <= document.keys():
        raise InputError(f"{path} is not a launch plan", hint=hint)
    if document["schema_version"] != PLAN_VERSION:
        version = document["schema_version"]
        raise InputError(f"{path}: plan of schema version {version}, this flashrl reads {PLAN_VERSION}")
    return document


def _newest_plan_file(run: RunPaths) -> Path | None:
    plans = (run.attempt(number).plan for number in reversed(run.attempts()))
    return next((plan for plan in plans if plan.is_file()), None)

"""The record of a run, `runs/<name>/run.json`: what was started when, from what, by which attempt, and how it ended.

Written by the process that supervises an attempt; every change goes through `change`, which locks, reads, and replaces the
file whole. An attempt's entry is never removed by a later attempt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashrl_cli import files
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from flashrl_cli.paths import RunPaths

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

"""One row for each run: what it is, how far it is, and what it takes on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli.runs import known
from flashrl_cli.runs.metrics import read_last
from flashrl_cli.runs.sizes import size

if TYPE_CHECKING:
    from flashrl_cli.runs.known import Known
    from flashrl_cli.runs.record import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A run in the list. What nothing on disk tells is None; times are ISO 8601 in UTC, sizes in bytes."""

    name: str
    preset: str | None
    state: Status | None
    step: int | None
    total_steps: int | None
    reward: float | None
    accuracy: float | None
    attempts: int
    changed: str
    run_bytes: int
    checkpoint_bytes: int
    problem: str | None
    """Why there is no record, if there should be one."""

    def document(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def rows() -> list[Row]:
    """All runs, the one that changed last first."""
    return sorted(map(row, known.every()), key=lambda one: (one.changed, one.name), reverse=True)


def row(run: Known) -> Row:
    """The row of one run, from its record and the end of its metrics."""
    logged = run.logged()
    step, accuracy = read_last(logged[1].metrics) if logged else (None, None)
    preset, total = _planned(run)
    last = run.last
    reached = step.step if step else None
    return Row(
        name=run.name,
        preset=run.record.preset if run.record else preset,
        state=run.state,
        step=last.last_step if last and last.last_step is not None else reached,
        total_steps=last.total_steps if last and last.total_steps is not None else total,
        reward=step["reward"] if step else None,
        accuracy=accuracy,
        attempts=max(len(run.record.attempts) if run.record else 0, len(run.paths.attempts())),
        changed=last.updated if last else _changed(run),
        run_bytes=size(run.paths.root),
        checkpoint_bytes=size(run.paths.checkpoints),
        problem=run.damage,
    )


def _planned(run: Known) -> tuple[str | None, int | None]:
    """Preset and number of steps by the newest plan; only read where the record does not tell."""
    if run.last and run.last.total_steps is not None:
        return None, None
    for number in reversed(run.paths.attempts()):
        if plan := run.plan(number):
            return plan.get("preset"), run.setting(number, "trainer", "steps")
    return None, None


def _changed(run: Known) -> str:
    """When anything of a run without a record was written last."""
    attempts = [run.paths.attempt(number) for number in run.paths.attempts()]
    places = [run.paths.root, *(file for one in attempts for file in (one.root, one.log, one.metrics))]
    return datetime.fromtimestamp(max(map(_modified, places)), UTC).isoformat(timespec="seconds")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

"""The checkpoints of one run: its steps and how good they are, what was set aside, and whether anything still writes them."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.errors import InputError
from flashrl_cli.runs import record
from flashrl_cli.runs.saved import DOOMED, REASON, SET_ASIDE, Saved, measure, saved_steps
from flashrl_cli.runs.scores import Scores, scores
from flashrl_cli.verl import checkpoints as layout

if TYPE_CHECKING:
    from flashrl_cli.runs.record import RunRecord

_HIDDEN_STEP = re.compile(r"global_step_\d+(-\d+)?")


@dataclass(frozen=True, slots=True)
class Hidden:
    """A step that was moved out of its run's way, and why."""

    path: Path
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """What a run has on disk, at one moment."""

    run: paths.RunPaths
    saved: tuple[Saved, ...]
    set_aside: tuple[Hidden, ...]
    scores: Scores | None
    leftovers: tuple[Hidden, ...] = ()
    """What an interrupted prune did not delete."""

    @property
    def newest(self) -> int | None:
        """The last step that a resume can go on from."""
        return max((one.step for one in self.saved if one.complete), default=None)

    @property
    def best(self) -> int | None:
        """The step with the best score."""
        return self.scores.ranked()[0] if self.scores else None


def run_paths(found: RunRecord) -> paths.RunPaths:
    """Where a recorded run lies. Raises InputError if its checkpoints' folder is none of that run's: nothing is looked for there.

    A run's checkpoints lie in a folder of its own name, so `/` or a home in a damaged record is refused.
    """
    folder = Path(found.checkpoints)
    if not folder.is_absolute() or folder.name != found.name or ".." in folder.parts:
        raise InputError(
            f"the record of run {found.name} says that its checkpoints lie in {found.checkpoints or 'no folder'}",
            hint=f"they lie in a folder {found.name}: correct {paths.runs_root() / found.name / 'run.json'}",
        )
    return paths.RunPaths(found.name, paths.runs_root() / found.name, folder)


def take_stock(run: paths.RunPaths) -> Stock:
    """Look at all checkpoints of `run`, judged by what its newest attempt loads when it resumes."""
    plan = newest_plan(run)
    critic = plan.get("spec", {}).get("algorithm", {}).get("advantage") == "gae"
    saved = saved_steps(run.checkpoints, critic=critic, loaded=layout.loaded(plan.get("overrides", [])))
    return Stock(
        run=run,
        saved=tuple(saved),
        set_aside=tuple(_set_aside(run.checkpoints)),
        scores=scores(run, saved),
        leftovers=tuple(Hidden(path, measure(path)[0], "") for path in hidden_steps(run.checkpoints / DOOMED)),
    )


def newest_plan(run: paths.RunPaths) -> dict[str, Any]:
    """The plan of the newest attempt that has one (`launch.plan.plan_document`); empty without any."""
    for number in reversed(run.attempts()):
        file = run.attempt(number).plan
        if file.is_file():
            try:
                plan = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{file} is not JSON: {error}", hint="move it away") from None
            return plan if isinstance(plan, dict) else {}
    return {}


def refuse_while_running(run: paths.RunPaths, doing: str) -> None:
    """Raise InputError while `run`, or another run with the same folder of checkpoints, still writes there."""
    names = list(writers(run.checkpoints))
    if not names and _trains(newest_plan(run).get("argv")):
        names = [f"{run.name} (flashrl is gone, verl is not)"]
    if names:
        raise InputError(
            f"{doing}: {', '.join(names)} is running and may be writing in {run.checkpoints}",
            hint=f"wait for its end, or `flashrl runs stop {run.name}`",
        )


def writers(run_checkpoints: Path) -> Iterator[str]:
    """The recorded runs that are running and whose checkpoints are this folder, by whatever path: name and machine."""
    real = os.path.realpath(run_checkpoints)
    for file in sorted(paths.runs_root().glob("*/run.json")):
        with contextlib.suppress(InputError):  # another run's damaged record
            found = record.load(file)
            if found and os.path.realpath(found.checkpoints) == real:
                running = (attempt for attempt in found.attempts if record.state(attempt) == "running")
                yield from (f"{found.name} (on {attempt.host})" for attempt in running)


def hidden_steps(place: Path) -> list[Path]:
    """Steps that flashrl moved into `place`, a hidden folder of a run's checkpoints; links are not followed."""
    if not place.is_dir() or place.is_symlink():
        return []
    entries = (path for path in place.iterdir() if _HIDDEN_STEP.fullmatch(path.name))
    return sorted(path for path in entries if path.is_dir() and not path.is_symlink())


def _set_aside(run_checkpoints: Path) -> Iterator[Hidden]:
    for path in hidden_steps(run_checkpoints / SET_ASIDE):
        try:
            reason = (path / REASON).read_text(encoding="utf-8").strip()
        except OSError:
            reason = "not recorded"
        yield Hidden(path, measure(path)[0], reason)


def _trains(argv: object) -> bool:
    """Whether a process of this machine was started with exactly this command line."""
    import psutil

    return bool(argv) and any(process.info["cmdline"] == argv for process in psutil.process_iter(["cmdline"]))

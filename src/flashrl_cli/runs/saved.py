"""The checkpoints that a run saved: which can be resumed, how good they are, and which were superseded.

Nothing here imports torch or reads weights: truncated files are found by their headers (`weights.torn`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashrl_cli import files
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.hub import hf_problem
from flashrl_cli.runs import store
from flashrl_cli.runs.checkpoints import EVAL_FOLDER
from flashrl_cli.runs.metrics import history
from flashrl_cli.verl import checkpoints as layout
from flashrl_cli.weights import torn

if TYPE_CHECKING:
    from flashrl_cli.paths import RunPaths

SET_ASIDE = ".set_aside"
"""Hidden folder of a run's checkpoints that holds the superseded steps, which a resume moved out of its way.

No pattern matches it, because it is hidden.
"""
DOOMED = ".pruned"
"""Folder of a run's checkpoints in which steps wait to be deleted."""
REASON = "reason.txt"

_DAMAGED = "truncated or damaged"
_HIDDEN_STEP = re.compile(r"global_step_\d+(-\d+)?")

Evidence = Literal["evaluation", "validation", "reward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """One `global_step_N` folder on disk."""

    step: int
    path: Path
    problems: tuple[str, ...]
    """Each file that a resume would lack, with what is wrong with it; empty for a complete and readable step."""
    world_size: int | None
    """Number of trainer processes that saved the step; only the same number can load it."""
    bytes: int
    written: float
    """Modification time of its newest file, in seconds since the epoch."""
    has_hf: bool
    """Whether it also holds complete weights in Hugging Face's format."""
    has_weights: bool
    """Whether the policy's weights are there in either format: enough to evaluate, but not necessarily to resume."""
    tracked: bool
    """Whether verl resumes from this step by default (its tracker file names it)."""
    lora: bool

    @property
    def complete(self) -> bool:
        """Whether a run can resume from it."""
        return not self.problems


def saved_steps(run_checkpoints: Path, *, critic: bool, loaded: layout.Loaded | None = None) -> list[Saved]:
    """Every step of a run's checkpoints, by number; empty if the folder does not exist. See `inspect`."""
    return [inspect(folder, critic=critic, loaded=loaded) for folder in _step_folders(run_checkpoints)]


def inspect(step_folder: Path, *, critic: bool, loaded: layout.Loaded | None = None) -> Saved:
    """Inspect `step_folder`: what it holds, and what a resume would lack there.

    `critic`: whether the run trains a critic. `loaded`: what the run loads when it resumes (`verl.checkpoints.loaded`),
    by default everything. Raises EnvironmentNotReady for a folder that the user may not read.
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


def _step_folders(folder: Path) -> list[Path]:
    """Folders `global_step_N` in `folder`, ordered by number. Raises EnvironmentNotReady."""
    with _readable(folder):
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        steps = (step for step in map(layout.step_number, names) if step is not None)
        candidates = [folder / layout.step_name(step) for step in sorted(set(steps))]
        return [path for path in candidates if path.name in names and path.is_dir()]


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
    if loaded.queue:
        yield from _queue_problems(step_folder)


def _queue_problems(step_folder: Path) -> Iterator[str]:
    """Yield what is wrong with the prompts and responses that an asynchronous mode saved with the step.

    A step that was saved completely in mode `sync` has none, and needs none: nothing was sampled ahead.
    """
    if not (step_folder / layout.QUEUE).is_dir():
        tracked, step = layout.tracked_step(step_folder.parent), layout.step_number(step_folder.name)
        if tracked is None or step is None or step > tracked:
            yield f"{layout.QUEUE}/: missing"
        return
    for file in layout.queue_texts(step_folder):
        if problem := _unreadable_json(file):
            yield f"{file.relative_to(step_folder)}: {problem}"
    for file in layout.queue_pickles(step_folder) or ():
        if problem := _unreadable_pickle(file):
            yield f"{file.relative_to(step_folder)}: {problem}"


def _model_problems(step_folder: Path, name: str, parts: frozenset[str]) -> Iterator[str]:
    """Yield what is wrong in `actor/` or `critic/`, each with the path of the file within the step."""
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


def _unreadable_pickle(file: Path) -> str | None:
    """What is wrong with a pickle, of which only the last byte is read: every pickle ends with the opcode STOP."""
    try:
        with file.open("rb") as stream:
            if not stream.seek(0, os.SEEK_END):
                return "empty"
            stream.seek(-1, os.SEEK_END)
            return None if stream.read() == pickle.STOP else _DAMAGED
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"unreadable ({error.strerror or error})"


def measure(folder: Path) -> tuple[int, float]:
    """Bytes of all files in `folder` (links not followed), and the newest modification time in seconds since the epoch.

    Both are 0 if the folder does not exist; files that vanish meanwhile do not count.
    """
    size, newest = 0, 0.0
    with contextlib.suppress(FileNotFoundError):
        newest = folder.stat().st_mtime
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(root, name))
                size, newest = size + found.st_size, max(newest, found.st_mtime)
    return size, newest


def set_aside(step_folder: Path, why: str) -> Path:
    """Move a superseded step into `.set_aside` beside it, with the reason `why`; returns its new path.

    Raises the errors of `hide`.
    """
    target = hide(step_folder, step_folder.parent / SET_ASIDE)
    # a reason that cannot be written is no failure: often a full disk made the checkpoint incomplete
    with contextlib.suppress(OSError):
        files.write_text(target / REASON, f"{why}\n")
    return target


def hide(folder: Path, place: Path) -> Path:
    """Rename `folder` into the hidden folder `place` (on the same file system); returns its new path.

    Nothing is copied or overwritten: if the name is taken, a number is added. Raises EnvironmentNotReady if the file
    system refuses.
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


def _reserve(folder: Path, name: str) -> Path:
    """Create a new, empty folder `name`, `name-2`, … in `folder`; renaming a folder over it replaces nothing else."""
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


def point_tracker(run_checkpoints: Path, step: int | None) -> None:
    """Make verl resume from `step` by default, or start from scratch for None.

    Raises InputError if the step does not exist: verl would silently start from scratch.
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


@dataclass(frozen=True, slots=True)
class Scores:
    """A value for each saved step from one evidence: accuracy of `evaluation`, of `validation`, or mean `reward`."""

    by: Evidence
    values: Mapping[int, float]

    def ranked(self) -> list[int]:
        """Steps from best to worst; the later one first if two are equal."""
        return sorted(self.values, key=lambda step: (self.values[step], step), reverse=True)


def scores(run: RunPaths, saved: Collection[Saved]) -> Scores | None:
    """Scores of those of `saved` that hold weights, by the first evidence that has any value; None if none has.

    An evaluation that is older than a step's files is ignored, because it evaluated other weights. Reward is the mean
    over the step's own batch.
    """
    usable = {one.step: one for one in saved if one.has_weights}
    logged = functools.cache(lambda: history(run))
    sources: dict[Evidence, Callable[[], Mapping[int, float]]] = {
        "evaluation": lambda: _evaluated(run.checkpoints, usable),
        "validation": lambda: {m.step: m.accuracy for m in logged() if m.accuracy is not None},
        "reward": lambda: {m.step: value for m in logged() if (value := m["reward"]) is not None},
    }
    for by, read in sources.items():
        if values := {step: value for step, value in read().items() if step in usable}:
            return Scores(by, values)
    return None


def _evaluated(run_checkpoints: Path, steps: Mapping[int, Saved]) -> dict[int, float]:
    """Accuracy by step from the newest evaluation, of the run or of its project, that includes one of `steps`.

    Raises InputError for a file that is not an evaluation.
    """
    places = (run_checkpoints / EVAL_FOLDER, run_checkpoints.parent / EVAL_FOLDER)
    found = [file for place in places if (file := place / "eval.json").is_file()]
    for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True):
        rows = dict(_rows(file, run_checkpoints))
        when = file.stat().st_mtime
        if known := {step: rows[step] for step in rows if step in steps and steps[step].written <= when}:
            return known
    return {}


def _rows(file: Path, run_checkpoints: Path) -> Iterator[tuple[int, float]]:
    """Yield step and accuracy of the evaluation's rows that belong to the run, on its first data set."""
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        first = document["datasets"][0]["name"] if "datasets" in document else None  # older files have one set
        for row in document["results"]:
            if (
                row.get("dataset") == first
                and row["step"] is not None
                and _is_of(Path(row["path"]), run_checkpoints, row["step"])
            ):
                yield int(row["step"]), float(row["accuracy"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no evaluation: {error}", hint="move it away, or evaluate again") from None


def _is_of(weights: Path, run_checkpoints: Path, step: int) -> bool:
    own = Path(os.path.realpath(run_checkpoints / layout.step_name(step)))
    return own in Path(os.path.realpath(weights)).parents


@dataclass(frozen=True, slots=True)
class Hidden:
    """A step that was moved out of its run's way, with the reason."""

    path: Path
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointList:
    """All checkpoints of a run at one moment."""

    run: RunPaths
    saved: tuple[Saved, ...]
    set_aside: tuple[Hidden, ...]
    scores: Scores | None
    leftovers: tuple[Hidden, ...] = ()
    """Folders that an interrupted prune did not delete."""

    @property
    def newest(self) -> int | None:
        """The last step that a run can resume from."""
        return max((one.step for one in self.saved if one.complete), default=None)

    @property
    def best(self) -> int | None:
        """The step with the best score."""
        return self.scores.ranked()[0] if self.scores else None

    def document(self) -> dict[str, Any]:
        """The list as plain data."""
        values = self.scores.values if self.scores else {}
        steps = [
            {
                **asdict(one),
                "path": str(one.path),
                "complete": one.complete,
                "newest": one.step == self.newest,
                "best": one.step == self.best,
                "score": values.get(one.step),
            }
            for one in self.saved
        ]
        return {
            "run": self.run.name,
            "checkpoints": str(self.run.checkpoints),
            "score_by": self.scores.by if self.scores else None,
            "steps": steps,
            "set_aside": [{"path": str(one.path), "bytes": one.bytes, "reason": one.reason} for one in self.set_aside],
        }


def list_checkpoints(run: RunPaths) -> CheckpointList:
    """All checkpoints of `run`, judged by what its newest attempt would load to resume."""
    plan = store.newest_plan(run)
    critic = plan.get("spec", {}).get("algorithm", {}).get("advantage") == "gae"
    saved = saved_steps(run.checkpoints, critic=critic, loaded=layout.loaded(plan.get("overrides", [])))
    return CheckpointList(
        run=run,
        saved=tuple(saved),
        set_aside=tuple(_hidden(path, _reason(path)) for path in _hidden_steps(run.checkpoints / SET_ASIDE)),
        scores=scores(run, saved),
        leftovers=tuple(_hidden(path, "") for path in _hidden_steps(run.checkpoints / DOOMED)),
    )


def _hidden_steps(place: Path) -> list[Path]:
    """Steps that flashrl moved into `place`, a hidden folder of a run's checkpoints; links are not followed."""
    if not place.is_dir() or place.is_symlink():
        return []
    entries = (path for path in place.iterdir() if _HIDDEN_STEP.fullmatch(path.name))
    return sorted(path for path in entries if path.is_dir() and not path.is_symlink())


def _hidden(path: Path, reason: str) -> Hidden:
    return Hidden(path, measure(path)[0], reason)


def _reason(path: Path) -> str:
    try:
        return (path / REASON).read_text(encoding="utf-8").strip()
    except OSError:
        return "not recorded"


def refuse_while_running(run: RunPaths, doing: str) -> None:
    """Raise InputError while `run`, or another run with the same checkpoint folder, still writes there."""
    names = list(writers(run.checkpoints))
    if not names and _trains(store.newest_plan(run).get("argv")):
        names = [f"{run.name} (flashrl is gone, verl is not)"]
    if names:
        raise InputError(
            f"{doing}: {', '.join(names)} is running and may be writing in {run.checkpoints}",
            hint=f"wait for its end, or `flashrl runs stop {run.name}`",
        )


def writers(run_checkpoints: Path) -> Iterator[str]:
    """Yield name and machine of each running run whose checkpoints are in this folder, by whatever path."""
    real = os.path.realpath(run_checkpoints)
    for run in store.all_runs():
        if run.record and os.path.realpath(run.paths.checkpoints) == real:
            running = (attempt for attempt in run.attempts if store.state(attempt) == "running")
            yield from (f"{run.name} (on {attempt.host})" for attempt in running)


def _trains(argv: object) -> bool:
    """Whether a process on this machine was started with exactly this command line."""
    import psutil

    return bool(argv) and any(process.info["cmdline"] == argv for process in psutil.process_iter(["cmdline"]))

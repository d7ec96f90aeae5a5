"""How good a run's saved steps are, by the best evidence that there is: an evaluation, else validation, else reward."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashrl_cli.errors import InputError
from flashrl_cli.runs.checkpoints import EVAL_FOLDER
from flashrl_cli.runs.history import history
from flashrl_cli.verl import checkpoints as layout

if TYPE_CHECKING:
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.saved import Saved

Evidence = Literal["evaluation", "validation", "reward"]


@dataclass(frozen=True, slots=True)
class Scores:
    """A value for saved steps, all by the same evidence: accuracy of `evaluation` and `validation`, mean `reward`."""

    by: Evidence
    values: Mapping[int, float]

    def ranked(self) -> list[int]:
        """Steps from the best on; of two that are equal the later one first."""
        return sorted(self.values, key=lambda step: (self.values[step], step), reverse=True)


def scores(run: RunPaths, saved: Collection[Saved]) -> Scores | None:
    """Scores of those of `saved` whose weights are there, by the first evidence that knows one of them; None without any.

    An evaluation that is older than a step's files was one of other weights. Reward is the mean over the step's own batch.
    """
    usable = {one.step: one for one in saved if one.has_weights}
    sources: dict[Evidence, Callable[[], Mapping[int, float]]] = {
        "evaluation": lambda: evaluated(run.checkpoints, usable),
        "validation": lambda: {m.step: m.accuracy for m in history(run) if m.accuracy is not None},
        "reward": lambda: {m.step: value for m in history(run) if (value := m["reward"]) is not None},
    }
    for by, read in sources.items():
        if values := {step: value for step, value in read().items() if step in usable}:
            return Scores(by, values)
    return None


def evaluated(run_checkpoints: Path, steps: Mapping[int, Saved]) -> dict[int, float]:
    """Accuracy by step from the newest evaluation, of the run or of its project, that knows one of `steps`.

    Raises InputError for a file that is no evaluation.
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
    """Step and accuracy of an evaluation's rows that belong to the run, on the first of its data sets."""
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        first = document["datasets"][0]["name"] if "datasets" in document else None  # there were times of one alone
        for row in document["results"]:
            if (
                row.get("dataset") == first
                and row["step"] is not None
                and _is_of(Path(row["path"]), run_checkpoints, row["step"])
            ):
                yield int(row["step"]), float(row["accuracy"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no evaluation: {error}", hint="move it away, or evaluate again") from None


def _is_of(evaluated: Path, run_checkpoints: Path, step: int) -> bool:
    own = Path(os.path.realpath(run_checkpoints / layout.step_name(step)))
    return own in Path(os.path.realpath(evaluated)).parents

"""What a person asks to have evaluated, looked up and complete: after it, nothing is guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.evals import profiles, questions
from flashrl_cli.runs.checkpoints import EVAL_FOLDER, Checkpoint, Skipped, find, hf_folder

if TYPE_CHECKING:
    from flashrl_cli.evals.job import EngineSettings, Sampling
    from flashrl_cli.evals.results import DataSet

UNITS = "results"
"""Folder of an evaluation in which each checkpoint's graded responses are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Checkpoints (`base` and `baseline` among them, if given), what was passed over, questions and how to answer them.

    `base` is what the runs began with, `baseline` what the best is compared with. `folder` takes the results and the engine's log.
    `fail_under` is the accuracy that is to be reached (verdicts.Threshold).
    """

    patterns: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    base: Checkpoint | None
    baseline: Checkpoint | None
    skipped: tuple[Skipped, ...]
    data: tuple[DataSet, ...]
    sampling: Sampling
    engine: EngineSettings
    folder: Path
    fail_under: float | None = None

    @property
    def log(self) -> Path:
        """All output of the engine."""
        return self.folder / "engine.log"

    @property
    def units(self) -> Path:
        """Where each checkpoint's graded responses are kept."""
        return self.folder / UNITS

    @property
    def prompts(self) -> int:
        """Prompts to answer, over all checkpoints."""
        return len(self.checkpoints) * sum(len(one.questions) for one in self.data)

    def again(self) -> Request:
        """The request with the checkpoints that its patterns name now. Raises NothingMatched if there are none any more."""
        found = find(self.patterns)
        checkpoints = _all(found.checkpoints, self.base, self.baseline)
        return dataclasses.replace(self, checkpoints=checkpoints, skipped=found.skipped)

    def settings(self) -> dict[str, Any]:
        """How it was asked, as plain data."""
        return {"sampling": asdict(self.sampling), "rollout": self.engine.rollout, "profile": self.engine.profile}


def plan(
    patterns: Sequence[str],
    *,
    base: str | None,
    baseline: str | None,
    dataset: str | None,
    limit: int | None,
    sampling: Sampling,
    engine: EngineSettings,
    out: Path | None,
    fail_under: float | None = None,
) -> Request:
    """Look up checkpoints and questions; raises InputError or NothingMatched for what is not there."""
    found = find(patterns)
    start, other = (hf_folder(path) if path else None for path in (base, baseline))
    runs = (c.source for c in found.checkpoints if c.step is not None)
    checkpoints = _all(found.checkpoints, start, other)
    profiles.check(engine, [one.hf for one in checkpoints])
    return Request(
        patterns=tuple(patterns),
        checkpoints=checkpoints,
        base=start,
        baseline=other,
        skipped=found.skipped,
        data=questions.choose(dataset, runs, limit),
        sampling=sampling,
        engine=engine,
        folder=paths.absolute(out) if out else _place(found.checkpoints),
        fail_under=fail_under,
    )


def _all(found: Iterable[Checkpoint], base: Checkpoint | None, baseline: Checkpoint | None) -> tuple[Checkpoint, ...]:
    """Base, baseline and what was found, each once."""
    extra = [one for one in (base, baseline) if one]
    return tuple({one.path: one for one in (*extra, *found)}.values())


def _place(checkpoints: Iterable[Checkpoint]) -> Path:
    """`eval/` in the one run, or in the one project of the runs, else in the working folder."""
    sources = {c.source for c in checkpoints if c.step is not None}
    projects = {source.parent for source in sources}
    root = sources.pop() if len(sources) == 1 else projects.pop() if len(projects) == 1 else Path.cwd()
    return root / EVAL_FOLDER

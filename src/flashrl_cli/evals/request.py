"""What a person asks to have evaluated, looked up and complete: after it, nothing is guessed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import paths
from flashrl_cli.evals import questions
from flashrl_cli.runs.checkpoints import EVAL_FOLDER, Checkpoint, Skipped, find, hf_folder

if TYPE_CHECKING:
    from flashrl_cli.evals.job import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Checkpoints (`base` among them, if given), what was passed over, questions and how to answer them.

    `folder` takes the results, the engine's log and, while it runs, the work files.
    """

    checkpoints: tuple[Checkpoint, ...]
    base: Checkpoint | None
    skipped: tuple[Skipped, ...]
    data: tuple[Path, ...]
    questions: tuple[questions.Question, ...]
    sampling: Sampling
    rollout: str
    max_model_len: int | None
    folder: Path

    @property
    def log(self) -> Path:
        """All output of the engine."""
        return self.folder / "engine.log"

    @property
    def prompts(self) -> int:
        """Prompts to answer, over all checkpoints."""
        return len(self.checkpoints) * len(self.questions)


def plan(
    patterns: Sequence[str],
    *,
    base: str | None,
    data: str | None,
    limit: int | None,
    sampling: Sampling,
    rollout: str,
    max_model_len: int | None,
    out: Path | None,
) -> Request:
    """Look up checkpoints and questions; raises InputError or NothingMatched for what is not there."""
    found = find(patterns)
    start = hf_folder(base) if base else None
    others = [c for c in found.checkpoints if not start or c.hf != start.hf]
    files = questions.choose(data, (c.source for c in found.checkpoints if c.step is not None))
    return Request(
        checkpoints=(*([start] if start else []), *others),
        base=start,
        skipped=found.skipped,
        data=tuple(files),
        questions=tuple(questions.read(files, limit)),
        sampling=sampling,
        rollout=rollout,
        max_model_len=max_model_len,
        folder=paths.absolute(out) if out else _place(found.checkpoints),
    )


def _place(checkpoints: Iterable[Checkpoint]) -> Path:
    """`eval/` in the one run, or in the one project of the runs, else in the working folder."""
    sources = {c.source for c in checkpoints if c.step is not None}
    projects = {source.parent for source in sources}
    root = sources.pop() if len(sources) == 1 else projects.pop() if len(projects) == 1 else Path.cwd()
    return root / EVAL_FOLDER

"""Results of an evaluation, as an engine and a scorer would have made them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flashrl_cli.evals.questions import DataSet, Question
from flashrl_cli.evals.results import Entry, Evaluated, Grade, Response
from flashrl_cli.runs.checkpoints import Checkpoint


def data(count: int, name: str = "gsm8k") -> DataSet:
    questions = tuple(
        Question([{"role": "user", "content": f"{name}: {n} + {n}?"}], name, str(2 * n), None) for n in range(count)
    )
    return DataSet(name=name, file=Path(f"/data/{name}.parquet"), questions=questions)


def checkpoint(run: str, step: int | None) -> Checkpoint:
    source = Path("/checkpoints") / run
    return Checkpoint(source=source, step=step, hf=source / f"global_step_{step}", run=run)


def evaluated(
    of: Checkpoint, correct: Sequence[Sequence[bool]], dataset: str = "gsm8k", **grade: bool | str | None
) -> Evaluated:
    """Graded responses, `correct[question][sample]`; `grade` is what all grades have besides."""
    responses, grades = [], []
    for question, samples in enumerate(correct):
        for sample, right in enumerate(samples):
            text = f"I think\u2028it is {2 * question if right else 'é'}"
            responses.append(
                Response(question=question, sample=sample, response=text, tokens=2 + sample, cut=sample > 0)
            )
            made = Grade(score=float(right), correct=right, prediction=str(2 * question) if right else "é")
            grades.append(dataclasses.replace(made, **grade))  # type: ignore[arg-type]
    return Evaluated(
        checkpoint=of,
        data=data(len(correct), dataset),
        responses=tuple(responses),
        grades=tuple(grades),
        holds={"precision": "bf16"},
        seconds=1.5,
    )


def single(right: int, wrong: int) -> list[list[bool]]:
    """One sample a question: the first `right` ones right."""
    return [[True]] * right + [[False]] * wrong


def entry(run: str, step: int | None, correct: Sequence[Sequence[bool]], dataset: str = "gsm8k") -> Entry:
    return Entry(run, step, evaluated(checkpoint(run, step), correct, dataset))

"""Responses, their grades, and the result of one checkpoint on one data set.

While an engine answers, all samples of a question are written to one line of a JSON file as soon as they are complete:
a process that is killed loses only the questions that it was answering.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files

if TYPE_CHECKING:
    from flashrl_cli.evals.questions import DataSet
    from flashrl_cli.runs.checkpoints import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """Response number `sample` to question number `question` of a data set.

    `tokens` is its length, `cut` whether it ended at the token limit.
    """

    question: int
    sample: int
    response: str
    tokens: int
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """How a response was judged.

    `score` is the value of verl's scorer and `correct` whether that is right (strict: the form counts). `flexible` and
    `boxed` compare the answer itself, found anywhere or in the last box; they are None where that extractor does not
    apply to the data set. `prediction` is the answer that was found, or None. `problem` says why a scorer gave no
    verdict; that verdict counts as wrong.
    """

    score: float
    correct: bool
    flexible: bool | None = None
    boxed: bool | None = None
    prediction: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Graded responses of one checkpoint to one data set, ordered by question and sample.

    `holds` describes what the engine held (a contract.Handshake as plain data); `seconds` is the generation time.
    """

    checkpoint: Checkpoint
    data: DataSet
    responses: tuple[Response, ...]
    grades: tuple[Grade, ...]
    holds: dict[str, Any]
    seconds: float

    def by_question(self) -> list[list[tuple[Response, Grade]]]:
        """Responses with their grades, [question][sample]."""
        graded = zip(self.responses, self.grades, strict=True)
        return [list(samples) for _, samples in groupby(graded, key=lambda pair: pair[0].question)]


@dataclass(frozen=True, slots=True)
class Entry:
    """A result under the run and step that a report shows; a base is step 0 of every run that began with it."""

    run: str
    step: int | None
    result: Evaluated

    def called_in(self, run: str) -> str:
        """The name of this entry in a sentence about `run`."""
        if run == self.run:
            return "the model" if self.step is None else f"step {self.step}"
        return self.run if self.step is None else f"{self.run} step {self.step}"

    @property
    def marks(self) -> list[list[bool]]:
        """Whether each response is right, [question][sample]."""
        return [[grade.correct for _, grade in samples] for samples in self.result.by_question()]


def append(file: Path, samples: Sequence[Response]) -> None:
    """Add all samples of one question to `file`."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps([asdict(sample) for sample in samples], ensure_ascii=False) + "\n")


def read_answers(file: Path) -> dict[int, list[Response]]:
    """Samples by question. An incomplete line of a writer that was killed is skipped and removed from the file."""
    if not file.is_file():
        return {}
    complete = list(_complete_lines(file))
    kept = "".join(line for line, _ in complete)
    if len(kept.encode()) != file.stat().st_size:
        files.write_text(file, kept)
    return {samples[0].question: samples for _, samples in complete}


def _complete_lines(file: Path) -> Iterator[tuple[str, list[Response]]]:
    # responses contain characters that `str.splitlines` would split at
    with file.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        for line in stream:
            try:
                samples = [Response(**sample) for sample in json.loads(line)]
            except (ValueError, TypeError):
                continue
            if samples and line.endswith("\n"):
                yield line, samples

"""What an evaluation finds out: graded responses of one checkpoint to one data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashrl_cli.evals.questions import Question
    from flashrl_cli.runs.checkpoints import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """Questions under one name, and the file they were read from."""

    name: str
    file: Path
    questions: tuple[Question, ...]


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

    `score` is what verl's scorer gave and `correct` whether that is right (strict: the form counts). `flexible` and `boxed` compare the
    answer itself, found anywhere or in the last box; None where that extractor does not apply to the data set. `prediction` is the
    answer that was found, None if none was. `problem` says why one of them gave no verdict; that one counts as wrong.
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

    `holds` is what the engine held (a contract.Handshake as plain data), `seconds` what generating took.
    """

    checkpoint: Checkpoint
    data: DataSet
    responses: tuple[Response, ...]
    grades: tuple[Grade, ...]
    holds: dict[str, Any]
    seconds: float

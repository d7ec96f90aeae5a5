"""What an evaluation finds out: graded responses of one checkpoint to one data set.

Responses as an engine writes them: all samples of a question on one line of JSON, as soon as it is answered.

A process that is killed loses the questions it was answering, and no others.

Every graded response of an evaluation, in one Parquet file; its questions are counted from 1, as rows of a data set are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.data.readers import require
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from flashrl_cli.evals.questions import Question
    from flashrl_cli.evals.verdicts import Entry
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


def append(file: Path, samples: Sequence[Response]) -> None:
    """Add all samples of one question to `file`."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps([asdict(sample) for sample in samples], ensure_ascii=False) + "\n")


def read_answers(file: Path) -> dict[int, list[Response]]:
    """Samples by question; a line that was cut off when its writer was killed is left out, and removed from the file."""
    if not file.is_file():
        return {}
    whole = list(_whole_lines(file))
    found = {samples[0].question: samples for _, samples in whole}
    kept = "".join(line for line, _ in whole)
    if len(kept.encode()) != file.stat().st_size:
        files.write_text(file, kept)
    return found


def _whole_lines(file: Path) -> Iterator[tuple[str, list[Response]]]:
    # responses hold characters that `str.splitlines` would split at
    with file.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        for line in stream:
            try:
                samples = [Response(**sample) for sample in json.loads(line)]
            except (ValueError, TypeError):
                continue
            if samples and line.endswith("\n"):
                yield line, samples


FILE = "responses.parquet"
MARKS = ("run", "step", "dataset", "question", "sample", "correct", "cut")
"""Columns that tell what was right, without the texts."""
_TYPES = {
    "run": "string", "step": "int64", "dataset": "string", "question": "int64", "sample": "int64",
    "prompt": "string", "ground_truth": "string", "response": "string", "prediction": "string",
    "score": "float64", "correct": "bool", "flexible": "bool", "boxed": "bool",
    "tokens": "int64", "cut": "bool", "problem": "string",
}  # fmt: skip


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Write the responses of `entries`, a row each, under the run and step that the entry is shown as."""
    pq = require("pyarrow.parquet")
    schema = _schema()
    with files.replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for entry in entries:
            writer.write_table(_table(list(_rows(entry)), schema))


def read_responses(path: Path, columns: Sequence[str] = tuple(_TYPES), **only: Any) -> list[dict[str, Any]]:
    """Rows of the file at `path`, of which `only` names columns and what they must be (a list: one of these).

    Raises InputError if it is no such file.
    """
    pa, pq = require("pyarrow"), require("pyarrow.parquet")
    filters = [(name, "in" if isinstance(value, list) else "=", value) for name, value in only.items()]
    try:
        table = pq.read_table(path, columns=list(columns), filters=filters or None)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}", hint="evaluate again: flashrl eval writes it") from None
    if missing := set(columns) - set(table.column_names):
        raise InputError(f"{path} holds no responses: no column {', '.join(sorted(missing))}")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def text_of(prompt: Sequence[Mapping[str, Any]]) -> str:
    """Chat messages as text: a lone one as it is, several under their roles."""
    texts = [(str(message.get("role")), _text(message.get("content"))) for message in prompt]
    return texts[0][1] if len(texts) == 1 else "\n\n".join(f"[{role}]\n{text}" for role, text in texts)


def _schema() -> Any:
    pa = require("pyarrow")
    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in _TYPES.items()])


def _table(rows: list[dict[str, Any]], schema: Any) -> Any:
    return require("pyarrow").Table.from_pylist(rows, schema=schema)


def _rows(entry: Entry) -> Iterator[dict[str, Any]]:
    data = entry.result.data
    for response, grade in zip(entry.result.responses, entry.result.grades, strict=True):
        question = data.questions[response.question]
        yield {
            "run": entry.run,
            "step": entry.step,
            "dataset": data.name,
            "question": response.question + 1,
            "sample": response.sample,
            "prompt": text_of(question.prompt),
            "ground_truth": _text(question.ground_truth),
            "response": response.response,
            "prediction": grade.prediction,
            "score": grade.score,
            "correct": grade.correct,
            "flexible": grade.flexible,
            "boxed": grade.boxed,
            "tokens": response.tokens,
            "cut": response.cut,
            "problem": grade.problem,
        }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

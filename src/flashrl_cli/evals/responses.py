"""All graded responses of an evaluation in one Parquet file, and the selection of those worth reading.

Questions are counted from 1, like the rows of a data set. Worth reading are the questions that are hardest and those
whose result changed between two steps; a single question can be selected, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files, paths
from flashrl_cli.data.readers import require
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.evals.stats import differences
from flashrl_cli.runs.checkpoints import EVAL_FOLDER

if TYPE_CHECKING:
    from flashrl_cli.evals.results import Entry

FILE = "responses.parquet"
_COLUMNS = {
    "run": "string", "step": "int64", "dataset": "string", "question": "int64", "sample": "int64",
    "prompt": "string", "ground_truth": "string", "response": "string", "prediction": "string",
    "score": "float64", "correct": "bool", "flexible": "bool", "boxed": "bool",
    "tokens": "int64", "cut": "bool", "problem": "string",
}  # fmt: skip
_MARKS = ("run", "step", "dataset", "question", "sample", "correct", "cut")
"""Columns that say which responses were right, without the texts."""
_ANSWER = (
    "step", "sample", "response", "prediction", "score", "correct", "flexible", "boxed", "tokens", "cut", "problem",
)  # fmt: skip
_DEPTHS = ("", "*/", "*/*/")
"""Where evaluations are below the checkpoint folder: beside projects, in a project, in a run."""

Step = int | None


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Write the responses of `entries`, one row each, under the run and step that the entry is shown as."""
    pa, pq = require("pyarrow"), require("pyarrow.parquet")
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in _COLUMNS.items()])
    with files.replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for entry in entries:
            writer.write_table(pa.Table.from_pylist(list(_rows(entry)), schema=schema))


def read(path: Path, columns: Sequence[str] = tuple(_COLUMNS), **only: Any) -> list[dict[str, Any]]:
    """Rows of the file at `path`; `only` maps columns to the required value (or a list of values).

    Raises InputError if it is not a file of responses.
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
    """Chat messages as text: a single one unchanged, several with their roles."""
    texts = [(str(message.get("role")), _text(message.get("content"))) for message in prompt]
    return texts[0][1] if len(texts) == 1 else "\n\n".join(f"[{role}]\n{text}" for role, text in texts)


def _rows(entry: Entry) -> Iterator[dict[str, Any]]:
    data = entry.result.data
    for response, grade in zip(entry.result.responses, entry.result.grades, strict=True):
        question = data.questions[response.question]
        yield {
            **asdict(response),
            **asdict(grade),
            "run": entry.run,
            "step": entry.step,
            "dataset": data.name,
            "question": response.question + 1,
            "prompt": text_of(question.prompt),
            "ground_truth": _text(question.ground_truth),
        }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One run on one data set in a file of responses; `runs` and `datasets` are all names in the file.

    `marks` says by step and question whether each sample is right; `cut` counts by step the responses that ended at the
    token limit.
    """

    file: Path
    run: str
    runs: tuple[str, ...]
    dataset: str
    datasets: tuple[str, ...]
    marks: Mapping[Step, Mapping[int, Sequence[bool]]]
    cut: Mapping[Step, int]

    def accuracy(self, step: Step) -> float:
        """Share of right responses at `step`."""
        samples = list(self.marks[step].values())
        return sum(map(sum, samples)) / sum(map(len, samples))

    @property
    def first(self) -> Step:
        """The earliest step."""
        return next(iter(self.marks))

    @property
    def best(self) -> Step:
        """The step with the highest accuracy; the later one if two are equal."""
        return max(list(self.marks)[::-1], key=self.accuracy)

    def checked(self, step: int) -> int:
        """Return `step`; raises InputError if it was not evaluated."""
        if step not in self.marks:
            known = ", ".join("–" if one is None else str(one) for one in self.marks)
            raise InputError(f"step {step} of {self.run} is not in {self.file}", hint=f"steps there: {known}")
        return step


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """Questions answered right more often at one step than at another (`gained`), and less often (`lost`).

    `p` is the p-value of these two steps alone. `same` counts the other questions.
    """

    gained: tuple[int, ...]
    lost: tuple[int, ...]
    same: int
    p: float


def find(where: str | None) -> Path:
    """The file of responses in a folder, or in the `eval/` folder of a run or project.

    Without a folder it is the newest one below the checkpoints. Raises NothingMatched if there are none.
    """
    if where is not None:
        path = paths.absolute(where)
        places = [path, path / FILE, path / EVAL_FOLDER / FILE]
    else:
        path = paths.checkpoints_root()
        found = [file for depth in _DEPTHS for file in path.glob(f"{depth}{EVAL_FOLDER}/{FILE}")]
        places = sorted(
            [*found, paths.absolute(EVAL_FOLDER) / FILE],
            key=lambda f: -f.stat().st_mtime if f.is_file() else 0,
        )
    if file := next((place for place in places if place.is_file()), None):
        return file
    raise NothingMatched(f"no {FILE} in {path}", hint='flashrl eval "checkpoints/*" writes one')


def view(file: Path, run: str | None, dataset: str | None) -> View:
    """The responses in `file` of a run (by default the one with most steps) on a data set (by default the first).

    Raises InputError for a run or data set that is not in the file.
    """
    rows = read(file, _MARKS)
    if not rows:
        raise InputError(f"{file} holds no responses")
    runs: dict[str, set[Step]] = {}
    for row in rows:
        runs.setdefault(row["run"], set()).add(row["step"])
    run = _chosen(run, list(runs), "run", file) or max(runs, key=lambda name: len(runs[name]))
    datasets = list(dict.fromkeys(row["dataset"] for row in rows if row["run"] == run))
    dataset = _chosen(dataset, datasets, "data set", file) or datasets[0]
    marks: dict[Step, dict[int, list[bool]]] = {}
    cut: dict[Step, int] = {}
    for row in rows:
        if (row["run"], row["dataset"]) == (run, dataset):
            marks.setdefault(row["step"], {}).setdefault(row["question"], []).append(row["correct"])
            cut[row["step"]] = cut.get(row["step"], 0) + row["cut"]
    ordered = {step: marks[step] for step in sorted(marks, key=lambda step: -1 if step is None else step)}
    return View(
        file=file,
        run=run,
        runs=tuple(runs),
        dataset=dataset,
        datasets=tuple(datasets),
        marks=ordered,
        cut=cut,
    )


def worst(seen: View, step: Step) -> list[int]:
    """Questions that are not always answered right at `step`: fewest right there first, then fewest right overall."""
    at_all = {q: [mark for marks in seen.marks.values() for mark in marks.get(q, ())] for q in seen.marks[step]}
    ranked = sorted(seen.marks[step], key=lambda q: (_share(seen.marks[step][q]), _share(at_all[q]), q))
    return [question for question in ranked if not all(seen.marks[step][question])]


def changed(seen: View, before: Step, after: Step) -> Changed:
    """Questions that changed from step `before` to step `after`, the largest changes first."""
    one, other = seen.marks[before], seen.marks[after]
    if one.keys() != other.keys():
        raise InputError(f"steps {before} and {after} did not answer the same questions")
    moves = {q: _share(other[q]) - _share(one[q]) for q in one}
    ranked = sorted(moves, key=lambda q: (-abs(moves[q]), q))
    columns = [[_share(marks[q]) for q in one] for marks in (one, other)]
    single = all(len(samples) == 1 for marks in (one, other) for samples in marks.values())
    return Changed(
        gained=tuple(q for q in ranked if moves[q] > 0),
        lost=tuple(q for q in ranked if moves[q] < 0),
        same=sum(move == 0 for move in moves.values()),
        p=differences(columns, [(1, 0)], single=single)[0].p,
    )


def questions(seen: View, numbers: Sequence[int], steps: Iterable[Step], *, brief: bool) -> list[dict[str, Any]]:
    """Questions by `numbers` with their responses at `steps`, as plain data.

    With `brief` one response per step: a wrong one if there is any; for several steps, the step with most right
    responses shows a right one.
    """
    wanted = list(steps)
    rows = read(seen.file, run=seen.run, dataset=seen.dataset, question=list(numbers)) if numbers else []
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers}
    for row in rows:
        if row["step"] in wanted:
            found[row["question"]].append(row)
    return [_question(seen, number, found[number], wanted, brief=brief) for number in numbers]


def _question(
    seen: View, number: int, rows: list[dict[str, Any]], steps: Sequence[Step], *, brief: bool
) -> dict[str, Any]:
    if not rows:
        raise InputError(f"no question {number} in {seen.file}", hint=f"from 1 to {max(seen.marks[seen.best])}")
    by_step = {step: [row for row in rows if row["step"] == step] for step in steps}
    right = {step: _share([row["correct"] for row in answers]) for step, answers in by_step.items() if answers}
    shown = []
    for step, share in right.items():
        mark = len(right) > 1 and share == max(right.values())
        shown += [min(by_step[step], key=lambda row: row["correct"] != mark)] if brief else by_step[step]
    return {
        "question": number,
        "prompt": rows[0]["prompt"],
        "ground_truth": rows[0]["ground_truth"],
        "right": [{"step": s, "right": sum(seen.marks[s][number]), "of": len(seen.marks[s][number])} for s in right],
        "responses": [{name: row[name] for name in _ANSWER} for row in shown],
    }


def _chosen(name: str | None, known: Sequence[str], what: str, file: Path) -> str | None:
    if name is not None and name not in known:
        raise InputError(f"no {what} {name} in {file}", hint=f"there: {', '.join(known)}")
    return name


def _share(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks)

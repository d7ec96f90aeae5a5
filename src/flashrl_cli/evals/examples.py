"""Responses worth reading: the questions that are hardest, those that changed between two steps, or a single one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrl_cli import paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.evals import results
from flashrl_cli.evals.stats import differences
from flashrl_cli.runs.checkpoints import EVAL_FOLDER

Step = int | None
_DEPTHS = ("", "*/", "*/*/")
"""Where evaluations lie below the folder of checkpoints: beside projects, in one, in a run."""
_ANSWER = (
    "step", "sample", "response", "prediction", "score", "correct", "flexible", "boxed", "tokens", "cut", "problem",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One run on one data set out of a file of responses, with what else there is.

    `marks` tell by step and question whether each sample is right; `cut` by step how many ended at the token limit.
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
        """The step of the highest accuracy; of two that are equal the later one."""
        return max(list(self.marks)[::-1], key=self.accuracy)

    def checked(self, step: int) -> int:
        """`step`; InputError if it was not evaluated."""
        if step not in self.marks:
            known = ", ".join("–" if one is None else str(one) for one in self.marks)
            raise InputError(f"step {step} of {self.run} is not in {self.file}", hint=f"steps there: {known}")
        return step


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """Questions answered right more often at step `after` than at step `before` (`gained`), and less often (`lost`).

    `p` is that of these two steps alone. `same` counts the other questions.
    """

    before: Step
    after: Step
    gained: tuple[int, ...]
    lost: tuple[int, ...]
    same: int
    p: float


def find(where: str | None) -> Path:
    """The responses in a folder (its own, or those of a run's or project's `eval/`), or the newest under the checkpoints.

    Raises NothingMatched if there are none.
    """
    if where is not None:
        path = paths.absolute(where)
        places = [path, path / results.FILE, path / EVAL_FOLDER / results.FILE]
    else:
        path = paths.checkpoints_root()
        found = [file for depth in _DEPTHS for file in path.glob(f"{depth}{EVAL_FOLDER}/{results.FILE}")]
        places = sorted(
            [*found, paths.absolute(EVAL_FOLDER) / results.FILE],
            key=lambda f: -f.stat().st_mtime if f.is_file() else 0,
        )
    if file := next((place for place in places if place.is_file()), None):
        return file
    raise NothingMatched(f"no {results.FILE} in {path}", hint='flashrl eval "checkpoints/*" writes one')


def view(file: Path, run: str | None, dataset: str | None) -> View:
    """What `file` holds of a run (by default that with most steps) on a data set (by default the first).

    Raises InputError for a run or data set that is not there.
    """
    rows = results.read_responses(file, results.MARKS)
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
    """Questions that are not always answered right at `step`: fewest right first, and of these the fewest right at all steps."""
    at_all = {q: [mark for marks in seen.marks.values() for mark in marks.get(q, ())] for q in seen.marks[step]}
    ranked = sorted(seen.marks[step], key=lambda q: (_share(seen.marks[step][q]), _share(at_all[q]), q))
    return [question for question in ranked if not all(seen.marks[step][question])]


def changed(seen: View, before: Step, after: Step) -> Changed:
    """What changed from step `before` to step `after`, the largest changes first."""
    one, other = seen.marks[before], seen.marks[after]
    if one.keys() != other.keys():
        raise InputError(f"steps {before} and {after} did not answer the same questions")
    moves = {q: _share(other[q]) - _share(one[q]) for q in one}
    ranked = sorted(moves, key=lambda q: (-abs(moves[q]), q))
    columns = [[_share(marks[q]) for q in one] for marks in (one, other)]
    single = all(len(samples) == 1 for marks in (one, other) for samples in marks.values())
    return Changed(
        before=before,
        after=after,
        gained=tuple(q for q in ranked if moves[q] > 0),
        lost=tuple(q for q in ranked if moves[q] < 0),
        same=sum(move == 0 for move in moves.values()),
        p=differences(columns, [(1, 0)], single=single)[0].p,
    )


def questions(seen: View, numbers: Sequence[int], steps: Iterable[Step], *, telling: bool) -> list[dict[str, Any]]:
    """Questions by `numbers` with their responses at `steps`, as plain data.

    With `telling` one response a step: a wrong one if any is wrong, but of several steps that with most right ones shows a right one.
    """
    wanted = list(steps)
    rows = (
        results.read_responses(seen.file, run=seen.run, dataset=seen.dataset, question=list(numbers)) if numbers else []
    )
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers}
    for row in rows:
        if row["step"] in wanted:
            found[row["question"]].append(row)
    return [_question(seen, number, found[number], wanted, telling=telling) for number in numbers]


def _question(
    seen: View, number: int, rows: list[dict[str, Any]], steps: Sequence[Step], *, telling: bool
) -> dict[str, Any]:
    if not rows:
        raise InputError(f"no question {number} in {seen.file}", hint=f"from 1 to {max(seen.marks[seen.best])}")
    by_step = {step: [row for row in rows if row["step"] == step] for step in steps}
    right = {step: _share([row["correct"] for row in answers]) for step, answers in by_step.items() if answers}
    shown = []
    for step, share in right.items():
        mark = len(right) > 1 and share == max(right.values())
        shown += [min(by_step[step], key=lambda row: row["correct"] != mark)] if telling else by_step[step]
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

"""Accuracy of checkpoints: rows with intervals, their table, curves and files, and the conclusions they support."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.errors import RunFailed
from flashrl_cli.evals import responses, stats, verdicts
from flashrl_cli.evals.results import Entry
from flashrl_cli.evals.verdicts import Comparison, compare, compare_models
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.evals.questions import DataSet
    from flashrl_cli.evals.results import Evaluated
    from flashrl_cli.evals.stats import Difference
    from flashrl_cli.evals.verdicts import Threshold
    from flashrl_cli.runs.checkpoints import Checkpoint, Skipped

Table = tuple[list[str], list[list[object]]]
SCHEMA_VERSION = 2
CSV_COLUMNS = (
    "run", "dataset", "lo", "hi", "n", "prompts", "flexible", "boxed", "maj", "mean_length", "cut_share", "problems",
    "precision",
)  # fmt: skip
"""Columns after `step` and `score`, which come first for programs that read only these two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One checkpoint's result on one data set: accuracy with its 95 % interval over `n` responses to `prompts` prompts.

    `accuracy` is that of verl's scorer; `flexible` and `boxed` are those of the answer itself (None where no response
    has them). `pass_at` (by k) and `maj` need several responses to each prompt. `mean_length` is in tokens, `cut_share`
    the share of responses that ended at the token limit, `problems` the count of responses without a verdict,
    `precision` what the engine held the linear layers in.
    """

    run: str
    step: int | None
    dataset: str
    accuracy: float
    lo: float
    hi: float
    n: int
    prompts: int
    flexible: float | None
    boxed: float | None
    pass_at: dict[int, float]
    maj: float | None
    mean_length: float
    cut_share: float
    problems: int
    precision: str
    path: str
    seconds: float
    reward: float | None = None
    """Mean reward of a function of the user's; None with verl's scorers."""

    @classmethod
    def of(cls, entry: Entry) -> Row:
        """The row of a result."""
        result, marks = entry.result, entry.marks
        estimate = stats.accuracy(marks)
        count = len(result.responses)
        several = min(map(len, marks)) > 1
        votes = [
            [(g.prediction, g.correct if g.flexible is None else g.flexible) for _, g in samples]
            for samples in result.by_question()
        ]
        return cls(
            run=entry.run,
            step=entry.step,
            dataset=result.data.name,
            accuracy=estimate.value,
            lo=estimate.lo,
            hi=estimate.hi,
            n=count,
            prompts=len(marks),
            flexible=_share(grade.flexible for grade in result.grades),
            boxed=_share(grade.boxed for grade in result.grades),
            pass_at={k: stats.pass_at(k, marks) for k in stats.budgets(min(map(len, marks)))} if several else {},
            maj=stats.majority(votes) if several else None,
            mean_length=sum(r.tokens for r in result.responses) / count,
            cut_share=sum(r.cut for r in result.responses) / count,
            problems=sum(grade.problem is not None for grade in result.grades),
            precision=result.holds["precision"],
            path=str(result.checkpoint.path),
            seconds=result.seconds,
            reward=sum(grade.score for grade in result.grades) / count if _own_reward(result) else None,
        )


def _own_reward(result: Evaluated) -> bool:
    return any(question.reward for question in result.data.questions)


def _share(marks: Iterable[bool | None]) -> float | None:
    known = [mark for mark in marks if mark is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True)
class Place:
    """A model's place on a leaderboard: its row, and how far it is behind the best; None for the best itself."""

    rank: int
    model: str
    row: Row
    behind: Difference | None

    def document(self) -> dict[str, Any]:
        """The place as plain data."""
        behind = {**asdict(self.behind), "significant": self.behind.significant} if self.behind else None
        return {"rank": self.rank, "model": self.model, **asdict(self.row), "behind": behind}


@dataclass(frozen=True, slots=True)
class Board:
    """Models by their accuracy on one data set, and the comparisons of the best with each other one."""

    dataset: str
    places: tuple[Place, ...]
    comparisons: tuple[Comparison, ...]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Board:
        """Rank `entries`, results of several models on one data set."""
        compared = compare_models(entries)
        named = {entry.called_in(""): Row.of(entry) for entry in entries}
        ranked = [(compared[0].best, None), *((one.other, one.difference) for one in compared)]
        places = [Place(rank, model, named[model], behind) for rank, (model, behind) in enumerate(ranked, 1)]
        return cls(entries[0].result.data.name, tuple(places), tuple(compared))

    def document(self) -> dict[str, Any]:
        """The leaderboard as plain data."""
        return {"dataset": self.dataset, "places": [place.document() for place in self.places]}


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation's rows by run, step and data set, their comparisons, and the settings that produced them.

    `verdicts` are the conclusions that the numbers support, one sentence each; `boards` rank several models on each
    data set; `threshold` is None without `--fail-under`.
    """

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    verdicts: tuple[str, ...]
    datasets: tuple[DataSet, ...]
    entries: tuple[Entry, ...]
    skipped: tuple[Skipped, ...]
    settings: dict[str, Any]
    seconds: float
    boards: tuple[Board, ...] = ()
    threshold: Threshold | None = None

    @classmethod
    def of(
        cls,
        evaluated: Sequence[Evaluated],
        *,
        base: Checkpoint | None,
        baseline: Checkpoint | None,
        skipped: Iterable[Skipped],
        settings: dict[str, Any],
        seconds: float,
        fail_under: float | None = None,
    ) -> Report:
        """Build the report from results.

        `base` is shown as step 0 of every run that has steps; the best steps are compared with `baseline`. `settings`
        are added to the document unchanged; `seconds` is wall-clock time; `fail_under` is the accuracy to reach.
        """
        entries = tuple(_entries(evaluated, base))
        on_steps = tuple(_comparisons(entries, evaluated, base, baseline))
        beside = [one.path for one in (base, baseline) if one]
        boards = tuple(map(Board.of, _models(entries, beside)))
        on_models = tuple(comparison for board in boards for comparison in board.comparisons)
        said = (
            *verdicts.on_steps(on_steps),
            *verdicts.on_models(on_models),
            *verdicts.understated(entries),
            *verdicts.without_verdict(entries),
        )
        datasets = tuple({e.data.name: e.data for e in evaluated}.values())
        passed_over = tuple(skipped)
        threshold = None
        if fail_under is not None:
            threshold = verdicts.judge(fail_under, entries, beside=beside, skipped=passed_over)
        return cls(
            rows=tuple(map(Row.of, entries)),
            comparisons=(*on_steps, *on_models),
            verdicts=said,
            datasets=datasets,
            entries=entries,
            skipped=passed_over,
            settings=settings,
            seconds=seconds,
            boards=boards,
            threshold=threshold,
        )

    def document(self) -> dict[str, Any]:
        """The complete evaluation as one JSON document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "datasets": [{"name": d.name, "file": str(d.file), "prompts": len(d.questions)} for d in self.datasets],
            **self.settings,
            "engine": self.entries[0].result.holds,
            "results": [asdict(row) for row in self.rows],
            "comparisons": [comparison.document() for comparison in self.comparisons],
            "leaderboard": [board.document() for board in self.boards],
            "verdicts": list(self.verdicts),
            "threshold": self.threshold.document() if self.threshold else None,
            "skipped": [{"path": str(s.path), "reason": s.reason} for s in self.skipped],
            "wall_s": self.seconds,
        }

    def table(self) -> Table:
        """Columns and cells, at most 100 characters wide: all columns for one data set, or accuracies on several."""
        names = [data.name for data in self.datasets]
        return _of_one(self.rows) if len(names) == 1 else _of_several(self.rows, names)

    def curves(self) -> list[dict[str, Any]]:
        """Accuracy by step of each run and data set with at least two steps: keyword arguments of figure.Series."""
        by_curve: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.step is not None:
                by_curve.setdefault((row.run, row.dataset), []).append(row)
        curves = []
        for (run, dataset), points in by_curve.items():
            if len(points) > 1:
                xs = [p.step for p in points]
                ys, los, his = ([getattr(p, name) for p in points] for name in ("accuracy", "lo", "hi"))
                label = f"{run} {dataset}" if len(self.datasets) > 1 else run
                curves.append({"label": label, "xs": xs, "ys": ys, "los": los, "his": his})
        return curves

    def require_all(self) -> None:
        """Raise RunFailed if checkpoints were refused because of their weights, since the report lacks them."""
        if refused := [str(one.path) for one in self.skipped if one.refused]:
            verbs = ("was", "has") if len(refused) == 1 else ("were", "have")
            what = f"{counted(len(refused), 'checkpoint')} {verbs[0]} refused and {verbs[1]} no result"
            raise RunFailed(f"{what}: {', '.join(refused)}", hint="save or copy it again; all others are evaluated")

    def write(self, folder: Path) -> None:
        """Write `eval.csv`, `eval.json` and `responses.parquet` (every response with its grade) to `folder`."""
        responses.write(folder / responses.FILE, self.entries)
        files.write_text(folder / "eval.csv", _csv(self.rows))
        files.write_json(folder / "eval.json", self.document())


def _entries(evaluated: Sequence[Evaluated], base: Checkpoint | None) -> list[Entry]:
    runs = list(dict.fromkeys(e.checkpoint.run for e in evaluated if e.checkpoint.step is not None))
    entries = []
    for result in evaluated:
        checkpoint = result.checkpoint
        if base and checkpoint.path == base.path:
            entries += [Entry(run, 0, result) for run in runs or [checkpoint.run]]
        else:
            entries.append(Entry(checkpoint.run, checkpoint.step, result))
    order = list(dict.fromkeys(e.data.name for e in evaluated))
    return sorted(entries, key=lambda e: (e.run, -1 if e.step is None else e.step, order.index(e.result.data.name)))


def _comparisons(
    entries: Sequence[Entry], evaluated: Sequence[Evaluated], base: Checkpoint | None, baseline: Checkpoint | None
) -> Iterator[Comparison]:
    """Yield comparisons of each run on each data set; a model that is not a step of a run is compared with the base."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.run, entry.result.data.name), []).append(entry)
    for (_, dataset), group in groups.items():
        start, other = (_result(checkpoint, dataset, evaluated) for checkpoint in (base, baseline))
        first = [Entry(start.checkpoint.run, 0, start)] if start and group[0].step is None else []
        yield from compare(
            [*first, *group], Entry(other.checkpoint.run, other.checkpoint.step, other) if other else None
        )


def _models(entries: Sequence[Entry], beside: Sequence[Path]) -> Iterator[list[Entry]]:
    """Yield the models on each data set, if there are several: the newest step of each run, and models of no run.

    The newest step is not chosen by its result, so that no run has an advantage by many steps. Base and baseline
    (`beside`) have comparisons of their own.
    """
    newest: dict[str, dict[str, Entry]] = {}
    for entry in entries:  # in the order of their steps
        if entry.result.checkpoint.path not in beside:
            newest.setdefault(entry.result.data.name, {})[entry.run] = entry
    yield from (list(models.values()) for models in newest.values() if len(models) > 1)


def _result(checkpoint: Checkpoint | None, dataset: str, evaluated: Sequence[Evaluated]) -> Evaluated | None:
    if checkpoint is None:
        return None
    return next((e for e in evaluated if e.checkpoint.path == checkpoint.path and e.data.name == dataset), None)


def _csv(rows: Sequence[Row]) -> str:
    budgets = sorted({k for row in rows for k in row.pass_at})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["step", "score", *CSV_COLUMNS, *(f"pass@{k}" for k in budgets)])
    for row in rows:
        shares = [row.pass_at.get(k) for k in budgets]
        writer.writerow([row.step, row.accuracy, *(getattr(row, name) for name in CSV_COLUMNS), *shares])
    return stream.getvalue()


_WIDTH = 100
_NARROW = 80
"""Width above which a table leaves out the name of its only run."""
_GAP = 3
"""Characters between columns; a line begins with one."""
_STYLES: tuple[Callable[[Row], str], ...] = (
    lambda row: f"{row.accuracy:.3f} ({row.lo:.3f}–{row.hi:.3f})",
    lambda row: f"{row.accuracy:.3f} ({row.lo:.2f}–{row.hi:.2f})",
    lambda row: f"{row.accuracy:.3f} ±{(row.hi - row.lo) / 2:.3f}",
    lambda row: f"{row.accuracy:.3f}",
)


def _of_one(rows: Sequence[Row]) -> Table:
    columns: dict[str, list[object]] = {
        "run": [row.run for row in rows],
        "step": [row.step for row in rows],
        "accuracy": [f"{row.accuracy:.3f}" for row in rows],
        "95 % interval": [f"{row.lo:.3f} – {row.hi:.3f}" for row in rows],
    }
    if any(row.reward is not None for row in rows):
        columns["reward"] = [_three(row.reward) for row in rows]
    for name in ("flexible", "boxed"):
        # an extractor that accepts nothing at all shows that the data set asks for another form
        if any(getattr(row, name) not in {None, 0.0, row.accuracy} for row in rows):
            columns[name] = [_three(getattr(row, name)) for row in rows]
    if any(row.pass_at for row in rows):
        most = max(k for row in rows for k in row.pass_at)
        columns[f"pass@{most}"] = [_three(row.pass_at.get(most)) for row in rows]
        columns[f"maj@{most}"] = [_three(row.maj) for row in rows]
    columns["mean length"] = [round(row.mean_length, 1) for row in rows]
    columns["cut"] = [f"{row.cut_share:.0%}" for row in rows]
    names, cells = list(columns), [list(line) for line in zip(*columns.values(), strict=True)]
    if _width(names, cells) > _NARROW and len({row.run for row in rows}) == 1:
        return names[1:], [line[1:] for line in cells]
    return names, cells


def _of_several(rows: Sequence[Row], datasets: Sequence[str]) -> Table:
    """A line for each run and step, in the most detailed style that fits."""
    lines: dict[tuple[str, int | None], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.run, row.step), {})[row.dataset] = row
    columns = ["run", "step", *datasets]
    cells: list[list[object]] = []
    for style in _STYLES:
        cells = [
            [run, step, *(style(found[name]) if name in found else None for name in datasets)]
            for (run, step), found in lines.items()
        ]
        if _width(columns, cells) <= _WIDTH:
            break
    return columns, cells


def _width(columns: Sequence[str], cells: Sequence[Sequence[object]]) -> int:
    widths = [max(len(str(cell)) for cell in column) for column in zip(columns, *cells, strict=True)]
    return 1 + sum(widths) + _GAP * (len(widths) - 1)


def _three(share: float | None) -> str | None:
    return None if share is None else f"{share:.3f}"

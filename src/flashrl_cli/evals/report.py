"""Results of an evaluation: rows, table and curves, and the files that keep them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.evals import stats

if TYPE_CHECKING:
    from flashrl_cli.evals.request import Request
    from flashrl_cli.evals.run import Evaluated, Outcome
    from flashrl_cli.runs.checkpoints import Checkpoint, Skipped

SCHEMA_VERSION = 1
CSV_COLUMNS = ("run", "step", "accuracy", "lo", "hi", "n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One checkpoint's result: accuracy with its 95 % interval over `n` responses to `prompts` prompts.

    `mean_length` is in tokens, `cut_share` the share of responses that ended at the token limit.
    """

    run: str
    step: int | None
    accuracy: float
    lo: float
    hi: float
    n: int
    prompts: int
    mean_length: float
    cut_share: float
    path: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation's rows, by run and step, with what is needed to say how they came about."""

    rows: tuple[Row, ...]
    outcome: Outcome
    settings: dict[str, Any]
    skipped: tuple[Skipped, ...]

    @classmethod
    def of(cls, request: Request, outcome: Outcome) -> Report:
        """The report of `outcome`; the request's base is shown as step 0 of every run that has steps."""
        settings = {
            "data": [str(file) for file in request.data],
            "prompts": len(request.questions),
            "sampling": asdict(request.sampling),
            "rollout": request.rollout,
        }
        rows = tuple(_rows(outcome.evaluated, request.base))
        return cls(rows, outcome, settings, (*request.skipped, *outcome.skipped))

    def document(self) -> dict[str, Any]:
        """The whole evaluation as one JSON document."""
        return {
            "schema_version": SCHEMA_VERSION,
            **self.settings,
            "engine": self.outcome.evaluated[0].holds,
            "results": [asdict(row) for row in self.rows],
            "skipped": [{"path": str(s.path), "reason": s.reason} for s in self.skipped],
            "wall_s": self.outcome.seconds,
        }

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Columns and cells for people."""
        columns = ["run", "step", "accuracy", "95 % interval", "n", "mean length", "cut"]
        return columns, [
            [
                r.run,
                r.step,
                f"{r.accuracy:.3f}",
                f"{r.lo:.3f} – {r.hi:.3f}",
                r.n,
                round(r.mean_length, 1),
                f"{r.cut_share:.0%}",
            ]
            for r in self.rows
        ]

    def curves(self) -> list[dict[str, Any]]:
        """Accuracy by step of each run with at least two steps, as keyword arguments of `render.plots.Series`."""
        curves = []
        for run, group in groupby((r for r in self.rows if r.step is not None), key=lambda r: r.run):
            points = list(group)
            if len(points) > 1:
                xs = [p.step for p in points]
                ys, los, his = ([getattr(p, name) for p in points] for name in ("accuracy", "lo", "hi"))
                curves.append({"label": run, "xs": xs, "ys": ys, "los": los, "his": his})
        return curves

    def write(self, folder: Path) -> None:
        """Write `eval.csv`, `eval.json` and `responses.jsonl` (every response with its score) to `folder`."""
        files.write_text(folder / "eval.csv", _csv(self.rows))
        files.write_text(folder / "responses.jsonl", "".join(_response_lines(self.outcome.evaluated)))
        files.write_json(folder / "eval.json", self.document())


def _rows(evaluated: Sequence[Evaluated], base: Checkpoint | None) -> list[Row]:
    runs = list(dict.fromkeys(e.checkpoint.run for e in evaluated if e.checkpoint.step is not None))
    rows = []
    for result in evaluated:
        checkpoint = result.checkpoint
        if base and checkpoint.hf == base.hf:
            rows += [_row(result, run, 0) for run in runs or [checkpoint.run]]
        else:
            rows.append(_row(result, checkpoint.run, checkpoint.step))
    return sorted(rows, key=lambda row: (row.run, -1 if row.step is None else row.step))


def _row(result: Evaluated, run: str, step: int | None) -> Row:
    responses = result.responses
    by_prompt = [[r["correct"] for r in group] for _, group in groupby(responses, key=lambda r: r["question"])]
    estimate = stats.accuracy(by_prompt)
    return Row(
        run=run,
        step=step,
        accuracy=estimate.value,
        lo=estimate.lo,
        hi=estimate.hi,
        n=len(responses),
        prompts=len(by_prompt),
        mean_length=sum(r["tokens"] for r in responses) / len(responses),
        cut_share=sum(r["cut"] for r in responses) / len(responses),
        path=str(result.checkpoint.hf),
        seconds=result.seconds,
    )


def _response_lines(evaluated: Iterable[Evaluated]) -> Iterable[str]:
    for result in evaluated:
        where = {"run": result.checkpoint.run, "step": result.checkpoint.step}
        yield from (json.dumps({**where, **r}, ensure_ascii=False) + "\n" for r in result.responses)


def _csv(rows: Iterable[Row]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows([getattr(row, name) for name in CSV_COLUMNS] for row in rows)
    return stream.getvalue()

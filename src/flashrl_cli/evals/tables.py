"""An evaluation's rows as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashrl_cli.evals.report import Row

Table = tuple[list[str], list[list[object]]]
WIDTH = 100
_NARROW = 80
"""A table wider than this does without the name of its only run."""
_GAP = 3
"""Characters between columns; a line begins with one."""
_STYLES: tuple[Callable[[Row], str], ...] = (
    lambda row: f"{row.accuracy:.3f} ({row.lo:.3f}–{row.hi:.3f})",
    lambda row: f"{row.accuracy:.3f} ({row.lo:.2f}–{row.hi:.2f})",
    lambda row: f"{row.accuracy:.3f} ±{(row.hi - row.lo) / 2:.3f}",
    lambda row: f"{row.accuracy:.3f}",
)


def table(rows: Sequence[Row], datasets: Sequence[str]) -> Table:
    """Columns and cells: all that is known on one data set, or the accuracies on several beside each other."""
    return _of_one(rows) if len(datasets) == 1 else _of_several(rows, datasets)


def _of_one(rows: Sequence[Row]) -> Table:
    columns: dict[str, Callable[[Row], object]] = {
        "run": lambda row: row.run,
        "step": lambda row: row.step,
        "accuracy": lambda row: f"{row.accuracy:.3f}",
        "95 % interval": lambda row: f"{row.lo:.3f} – {row.hi:.3f}",
    }
    for name in ("flexible", "boxed"):
        if any(getattr(row, name) not in {None, row.accuracy} for row in rows):
            columns[name] = _cell(name)
    if any(row.pass_at for row in rows):
        most = max(k for row in rows for k in row.pass_at)
        columns[f"pass@{most}"] = lambda row: _three(row.pass_at.get(most))
        columns[f"maj@{most}"] = lambda row: _three(row.maj)
    columns["mean length"] = lambda row: round(row.mean_length, 1)
    columns["cut"] = lambda row: f"{row.cut_share:.0%}"
    drawn = _drawn(columns, rows)
    if _width(*drawn) > _NARROW and len({row.run for row in rows}) == 1:
        del columns["run"]
        return _drawn(columns, rows)
    return drawn


def _drawn(columns: Mapping[str, Callable[[Row], object]], rows: Sequence[Row]) -> Table:
    return list(columns), [[cell(row) for cell in columns.values()] for row in rows]


def _of_several(rows: Sequence[Row], datasets: Sequence[str]) -> Table:
    """A line for each run and step, in the fullest style that fits."""
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
        if _width(columns, cells) <= WIDTH:
            break
    return columns, cells


def _width(columns: Sequence[str], cells: Sequence[Sequence[object]]) -> int:
    widths = [max(len(str(cell)) for cell in column) for column in zip(columns, *cells, strict=True)]
    return 1 + sum(widths) + _GAP * (len(widths) - 1)


def _cell(name: str) -> Callable[[Row], object]:
    return lambda row: _three(getattr(row, name))


def _three(share: float | None) -> str | None:
    return None if share is None else f"{share:.3f}"

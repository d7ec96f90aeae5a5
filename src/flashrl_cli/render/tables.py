"""Convert plain data to rich tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

_UNBOUND = 10_000
"""A width at which no cell is wrapped."""


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> Table:
    """Table of `rows`; None is shown as "–", floats with four digits; number columns are right-aligned."""
    out = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, name in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) or row[index] is None for row in rows)
        out.add_column(name, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        out.add_row(*map(_cell, row))
    return out


def parts(
    columns: Sequence[str], rows: Sequence[Sequence[object]], console: Console, *, joined: str = ""
) -> Iterator[Table]:
    """One table if `console` is wide enough for it, else several that each begin with the first column.

    Columns that are called `joined` stay with the one before them.
    """
    whole = [n for n in range(1, len(columns)) if columns[n] != joined or n == 1]
    groups = [list(range(start, end)) for start, end in zip(whole, [*whole[1:], len(columns)], strict=True)]
    shown: list[int] = []
    for group in groups:
        if shown and not _fits(_part(columns, rows, [*shown, *group]), console):
            yield _part(columns, rows, shown)
            shown = []
        shown += group
    yield _part(columns, rows, shown)


def _part(columns: Sequence[str], rows: Sequence[Sequence[object]], chosen: Sequence[int]) -> Table:
    found = [0, *chosen]
    return table([columns[n] for n in found], [[row[n] for n in found] for row in rows])


def _fits(one: Table, console: Console) -> bool:
    options = replace(console.options, max_width=_UNBOUND)
    return one.__rich_measure__(console, options).maximum <= console.width


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value))

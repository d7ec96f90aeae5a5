"""Progress bars for people."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.console import Console

    from flashrl_cli.render.output import Advance


@contextlib.contextmanager
def bar(console: Console, label: str, total: int | None) -> Iterator[Advance]:
    """Draw a bar with count, ETA and a note on `console`; yields `advance(n, note)`."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total, note="")

        def advance(n: int, note: str = "") -> None:
            progress.update(task, advance=n, note=note)

        yield advance

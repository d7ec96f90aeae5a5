"""One door to the terminal: data on stdout, talk on stderr, in the form that the reader wants.

Three readers: a person at a terminal (colour, live displays), a person reading a log (plain lines), a program (`--json`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console

    from flashrl_cli.errors import FlashrlError

PLAIN_WIDTH = 160


class Advance(Protocol):
    """What moves a progress bar on."""

    def __call__(self, n: int, note: str = "", /) -> None:
        """`n` more are done; `note` stands at the bar's end."""


def is_live(stream: Any) -> bool:
    """Whether a live display makes sense on `stream`: a terminal, not CI, not switched off."""
    return bool(stream.isatty()) and not os.environ.get("CI") and not os.environ.get("FLASHRL_NO_PROGRESS")


class Output:
    """Where a command writes its result (stdout) and its talk (stderr)."""

    def __init__(self, *, json_mode: bool = False) -> None:
        self.json_mode = json_mode

    @cached_property
    def stdout(self) -> Console:
        """Rich console on stdout; off a terminal it is wide and plain."""
        return _console(sys.stdout)

    @cached_property
    def stderr(self) -> Console:
        """Rich console on stderr."""
        return _console(sys.stderr)

    @property
    def live(self) -> bool:
        """Whether live displays may be drawn (on stderr)."""
        return not self.json_mode and is_live(sys.stderr)

    def document(self, data: dict[str, Any]) -> None:
        """Print one JSON document on stdout."""
        print(json.dumps(data, indent=2, ensure_ascii=False), flush=True)

    def json_line(self, data: dict[str, Any]) -> None:
        """Print one JSON object on one line of stdout."""
        print(json.dumps(data, ensure_ascii=False), flush=True)

    def text(self, text: str) -> None:
        """Print a line of the result on stdout, as it is."""
        print(text, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
        """Print a table on stdout; numbers are right-aligned."""
        from flashrl_cli.render.tables import table

        self.stdout.print(table(columns, rows, title=title))

    def wide_table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, joined: str = "") -> None:
        """Print a table of many numbers on stdout: where its columns do not fit side by side, in parts (tables.parts)."""
        from flashrl_cli.render.tables import parts

        for part in parts(columns, rows, self.stdout, joined=joined):
            self.stdout.print(part)

    def say(self, text: str) -> None:
        """Tell the person something on stderr (not part of the result)."""
        self.stderr.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Tell the person on stderr that something deserves attention."""
        self.say(f"warning: {text}")

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Advance]:
        """Show a bar with ETA on a terminal, else one line when it begins; yields `advance(n, note)`."""
        if not self.live:
            self.say(f"{label} …")
            yield lambda *_: None
            return
        from flashrl_cli.render.progress import bar

        with bar(self.stderr, label, total) as advance:
            yield advance


def _console(stream: Any) -> Console:
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False)


def print_error(error: FlashrlError) -> None:
    """Write `error:` and `hint:` lines, and every problem of an input, to stderr."""
    lines = [f"error: {error.message}"]
    for problem in error.problems:
        lines.append(f"  {problem.where}: {problem.message}" if problem.where else f"  {problem.message}")
        if problem.hint:
            lines.append(f"    hint: {problem.hint}")
    if error.hint:
        lines.append(f"hint: {error.hint}")
    print("\n".join(lines), file=sys.stderr, flush=True)

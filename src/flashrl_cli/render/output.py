"""All terminal output: data on stdout, messages on stderr, in the form that suits the reader.

There are three types of readers: a person at a terminal (colour, live displays), a person who reads a log (plain
lines), and a program (`--json`).

A closed pipe (`| head -1`), an encoding that lacks a character and a full disk do not end any work: see
`guard_streams`.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import json
import os
import select
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from flashrl_cli import files

if TYPE_CHECKING:
    from rich.console import Console

    from flashrl_cli.errors import FlashrlError

PLAIN_WIDTH = 160
ERRORS = "flashrl"
"""Name of the error handler of flashrl's streams (`codecs.register_error`)."""
PLAIN = str.maketrans(
    {"…": "...", "→": "->", "±": "+-", "≤": "<=", "≥": ">=", "‖": "||"}
    | dict(zip("–—−×·²✓✗─━│┊●★“”‘’", "---x*2+x--||**\"\"''", strict=True))
)
"""Replacements of flashrl's own non-ASCII characters, for encodings that lack them."""
GONE = frozenset({errno.EPIPE, errno.EIO})
"""Errors of a stream that has no reader any more: a closed pipe or a closed terminal."""


class Advance(Protocol):
    """A function that advances a progress bar."""

    def __call__(self, n: int, note: str = "", /) -> None:
        """Advance by `n`; `note` is shown at the bar's end."""


def is_live(stream: Any) -> bool:
    """Whether a live display is possible on `stream`: a terminal, not CI, not disabled."""
    return bool(stream.isatty()) and not os.environ.get("CI") and not os.environ.get("FLASHRL_NO_PROGRESS")


class Descriptor(io.RawIOBase):
    """A file descriptor whose writes never fail: the first error is stored as `lost`, and further data is dropped."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.lost: OSError | None = None
        self.ends_unread = False

    def fileno(self) -> int:
        """The descriptor's number."""
        return self._number

    def writable(self) -> bool:
        """Always true: what cannot be written is dropped."""
        return True

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._number)

    def write(self, data: Any) -> int:
        """Write a part of `data`; returns its length.

        Raises SystemExit if the reader of a command that only displays has gone.
        """
        while self.lost is None:
            try:
                return os.write(self._number, data)
            except BlockingIOError:
                select.select([], [self._number], [])
            except OSError as error:
                self.lost = error
        if self.ends_unread and self.lost.errno in GONE:
            self.ends_unread = False
            raise SystemExit(0)
        return len(data)


def guard_streams() -> None:
    """Give the process a stdout and a stderr whose errors do not end any work.

    Characters that the encoding lacks are replaced or escaped, undecodable bytes of file names are kept, output without
    a reader is dropped, and a closed stream (`>&-`) is replaced by /dev/null, before another file gets its number.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    codecs.register_error(ERRORS, _replaced)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # another program's stream, such as pytest's
            continue
        text = io.TextIOWrapper(
            io.BufferedWriter(Descriptor(number)),
            encoding=getattr(stream, "encoding", None) or "utf-8",
            errors=ERRORS,
            line_buffering=name == "stderr" or os.isatty(number),
        )
        if stream is not None:
            stream.flush()
        setattr(sys, name, text)


def end_when_unread() -> None:
    """From now on, end the process normally once nobody reads: for a command that shows what others do."""
    for descriptor in _descriptors():
        descriptor.ends_unread = True


def lost_result() -> OSError | None:
    """Why a part of the result did not reach its file, such as a full disk.

    None if it was written completely, or if nobody wanted to read it.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    lost = next(iter(_descriptors())).lost if _descriptors() else None
    return None if lost is None or lost.errno in GONE else lost


def _descriptors() -> list[Descriptor]:
    """The descriptors of the guarded streams, stdout's first."""
    raws = [getattr(getattr(stream, "buffer", None), "raw", None) for stream in (sys.stdout, sys.stderr)]
    return [raw for raw in raws if isinstance(raw, Descriptor)]


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replacement for the first character that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file name (PEP 383)
        return bytes([ord(character) - 0xDC00]), error.start + 1
    plain = character.translate(PLAIN)
    return plain.encode("ascii", "backslashreplace").decode("ascii"), error.start + 1


def _json(data: dict[str, Any], **form: Any) -> str:
    """JSON that any reader can decode: escaped if the stream is not UTF-8 or a string is not valid Unicode."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    return files.json_text(data, **form) if is_utf8 else json.dumps(data, **form)


class Output:
    """Writes the result of a command (stdout) and its messages (stderr)."""

    def __init__(self, *, json_mode: bool = False) -> None:
        self.json_mode = json_mode

    @cached_property
    def stdout(self) -> Console:
        """Rich console on stdout; without a terminal it is wide and plain."""
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
        print(_json(data, indent=2), flush=True)

    def json_line(self, data: dict[str, Any]) -> None:
        """Print one JSON object on one line of stdout."""
        print(_json(data), flush=True)

    def text(self, text: str) -> None:
        """Print a line of the result on stdout, unchanged."""
        print(text, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
        """Print a table on stdout; numbers are right-aligned."""
        from flashrl_cli.render.tables import table

        self.stdout.print(table(columns, rows, title=title))

    def wide_table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, joined: str = "") -> None:
        """Print a table of many numbers on stdout, in parts if its columns do not fit (`tables.parts`)."""
        from flashrl_cli.render.tables import parts

        for part in parts(columns, rows, self.stdout, joined=joined):
            self.stdout.print(part)

    def say(self, text: str) -> None:
        """Print a message on stderr, which is not part of the result."""
        self.stderr.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self.say(f"warning: {text}")

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Advance]:
        """Show a bar with ETA on a terminal, else one line at the start; yields `advance(n, note)`."""
        if not self.live:
            self.say(f"{label} …")
            yield lambda *_: None
            return

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


@contextlib.contextmanager
def bar(console: Console, label: str, total: int | None) -> Iterator[Advance]:
    """Draw a bar with count, remaining time and a note on `console`; yields `advance(n, note)`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

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

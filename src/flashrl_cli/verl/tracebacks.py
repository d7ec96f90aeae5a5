"""The exception at the root of a failed run, out of a log in which verl, Ray and vLLM nest and interleave tracebacks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flashrl_cli.verl.log_lines import plain

SOURCE = re.compile(r"(\([^()]*\bpid=\d+[^()]*\) ?|\[rank\d+\]:(?: |$)|(?:ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)")
"""What Ray, torch and vLLM put before every line of a process: who wrote it."""
REPEATED = re.compile(r" \[repeated \d+x across cluster\].*$")
FRAME = re.compile(r'^\s+(?:\| )?File "(?P<path>[^"]+)", line (?P<line>\d+), in ')
EXCEPTION = re.compile(r"^(?P<name>(?:[a-z_]\w*\.)*(?P<short>[A-Z]\w*))(?:: (?P<message>.*))?$")
HEADER = re.compile(
    r"^(?:Traceback \(most recent call last\):|(?:ray\.exceptions\.RayTaskError\(\w+\): )?.*\bray::\S+\(\) \(pid=)"
)
PACKAGES = re.compile(r"^.*/(?:site|dist)-packages/")
FOLLOWS = re.compile(
    r"ActorDiedError|ActorUnavailableError|RayActorError|WorkerCrashedError|EngineDeadError|CancelledError|KeyboardInterrupt"
    r"|SystemExit|BrokenPipeError|Connection was likely closed|Engine core initialization failed|WorkerProc initialization failed|cancelled"
)
"""Exceptions that only say that something else failed."""
MAX_LENGTH = 300


@dataclass(slots=True)
class _Reader:
    """The lines of one process so far: the frames of the traceback under way, and whether the last line belonged to it."""

    frames: list[tuple[str, int]] = field(default_factory=list)
    within: bool = False


@dataclass(frozen=True, slots=True)
class _Raised:
    text: str
    place: str | None

    def __str__(self) -> str:
        return f"{self.text} ({self.place})" if self.place else self.text


def root_error(lines: Sequence[str]) -> str | None:
    """The exception that made a run fail, in one line with the file and line that raised it, or None without a traceback.

    It is the last of the log that is no mere consequence of another process's end; of nested ones the innermost.
    """
    raised = list(_exceptions(lines))
    causes = [error for error in raised if not FOLLOWS.search(error.text)]
    return str((causes or raised)[-1]) if raised else None


def _exceptions(lines: Sequence[str]) -> Iterator[_Raised]:
    readers: dict[str, _Reader] = {}
    for line in lines:
        source, text = _split(line)
        reader = readers.setdefault(source, _Reader())
        frame = FRAME.match(text)
        if HEADER.match(text):
            reader.frames, reader.within = [], True
        elif frame:
            reader.frames.append((frame["path"], int(frame["line"])))
            reader.within = True
        elif reader.within and not text.startswith(" "):
            found = EXCEPTION.match(text)
            if found and reader.frames:
                yield _Raised(_shown(text), _place(reader.frames))
            reader.within = False


def _split(line: str) -> tuple[str, str]:
    """Who wrote a line, and what."""
    text, source = REPEATED.sub("", plain(line)), ""
    while found := SOURCE.match(text):
        source, text = source + _origin(found[0]), text[found.end() :]
    return source, text


def _origin(prefix: str) -> str:
    """A prefix less the time and place of a vLLM log call, which differ from line to line."""
    return "" if prefix.startswith(("ERROR", "CRITICAL")) else prefix.strip()


def _shown(text: str) -> str:
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 1] + "…"


def _place(frames: Sequence[tuple[str, int]]) -> str | None:
    """The innermost frame in the user's or verl's code, else the innermost at all."""
    own = [frame for frame in frames if _is_own(frame[0])]
    path, number = (own or frames)[-1]
    return f"{_short(path)}:{number}"


def _is_own(path: str) -> bool:
    installed = _short(path)
    if installed != path:
        return installed.startswith(("verl/", "flashrl_cli/"))
    return "/lib/python3" not in path and not path.startswith("<")


def _short(path: str) -> str:
    """A path less the folder of installed packages."""
    return PACKAGES.sub("", path)

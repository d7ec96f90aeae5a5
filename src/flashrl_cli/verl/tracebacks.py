"""The exception at the root of a failed run, out of a log in which verl, Ray and vLLM nest and interleave tracebacks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashrl_cli.verl.log_lines import plain

SOURCE = re.compile(
    r"(\((?:raylet\b[^()]*|[^()]*\bpid=\d+[^()]*)\) ?|\[rank\d+\]:(?: |$)|(?:ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)"
)
"""What Ray, torch and vLLM put before every line of a process: who wrote it."""
REPEATED = re.compile(r" \[repeated \d+x across cluster\].*$")
FRAME = re.compile(r'^\s+(?:\| )?File "(?P<path>[^"]+)", line (?P<line>\d+), in ')
EXCEPTION = re.compile(r"^(?:[a-z_]\w*\.)*[A-Z_]\w*(?::( .*)?)?$")
HEADER = re.compile(
    r"^(?:Traceback \(most recent call last\):|(?:ray\.exceptions\.RayTaskError\(\w+\): )?.*\bray::\S+\(\) \(pid=)"
)
PACKAGES = re.compile(r"^.*/(?:site|dist)-packages/")
FOLLOWS = re.compile(
    r"ActorDiedError|ActorUnavailableError|RayActorError|WorkerCrashedError|EngineDeadError|CancelledError|KeyboardInterrupt"
    r"|SystemExit|BrokenPipeError|Connection was likely closed|Engine core initialization failed|WorkerProc initialization failed|cancelled"
)
"""Exceptions that only say that something else failed."""
EMPTY = re.compile(r"EngineDeadError|SystemExit")
"""Exceptions that tell nothing: a stack trace that is not there when the engine was killed, and the answer to SIGTERM."""
UNFINISHED = re.compile(
    r":$|: \d+ validation errors? for \w+$|: Error\(s\) in loading state_dict for \w+:$|before finishing this task\.$"
)
DEATH = re.compile(r"Worker PID: (?P<pid>\d+) Worker exit type: \S+ Worker exit detail: (?P<why>[^.]+)")
"""What Ray tells of a process that died without an exception."""
MAX_LENGTH = 300


@dataclass(frozen=True, slots=True)
class _Raised:
    number: int
    text: str
    place: str

    def __str__(self) -> str:
        return f"{self.text} ({self.place})"


def root_error(lines: Sequence[str]) -> str | None:
    """The exception that made a run fail, in one line with the file and line that raised it, or None if the log tells nothing.

    It is the last of the log that is no mere consequence of another process's end; of nested ones the innermost. Without
    one it is the first process of Ray's that died.
    """
    sources: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines):
        source, text = _split(line)
        sources.setdefault(source, []).append((number, text))
    raised = [error for written in sources.values() for error in _exceptions(written)]
    causes = [error for error in raised if not FOLLOWS.search(error.text)]
    return _last(causes) or _first_death(lines) or _last([error for error in raised if not EMPTY.search(error.text)])


def _last(raised: Sequence[_Raised]) -> str | None:
    return str(max(raised, key=lambda error: error.number)) if raised else None


def _first_death(lines: Sequence[str]) -> str | None:
    """The first process whose death Ray's raylet tells, by the name that Ray puts before its lines."""
    texts = [plain(line) for line in lines]
    death = next((found for text in texts if (found := DEATH.search(text))), None)
    if death is None:
        return None
    named = re.compile(rf"^\((\w+) pid={death['pid']}[,)]")
    name = next((found[1] for text in texts if (found := named.match(text))), "process")
    return f"{name} (pid {death['pid']}): {death['why']}"


def _exceptions(written: Sequence[tuple[int, str]]) -> Iterator[_Raised]:
    """The exceptions that end the tracebacks in one process's numbered lines."""
    frames: list[tuple[str, int]] = []
    within = False
    for index, (number, text) in enumerate(written):
        frame = FRAME.match(text)
        if HEADER.match(text):
            frames, within = [], True
        elif frame:
            frames.append((frame["path"], int(frame["line"])))
        elif within and not text.startswith(" "):
            within = False
            if frames and EXCEPTION.match(text):
                following = written[index + 1][1] if index + 1 < len(written) else ""
                yield _Raised(number, _message(text, following), _place(frames))


def _message(text: str, following: str) -> str:
    """An exception's line, with the next one where that says what is wrong."""
    told = f"{text} {following.strip()}" if UNFINISHED.search(text) else text
    return told if len(told) <= MAX_LENGTH else told[: MAX_LENGTH - 1] + "…"


def _split(line: str) -> tuple[str, str]:
    """Who wrote a line, and what."""
    text, source = REPEATED.sub("", plain(line)), ""
    while found := SOURCE.match(text):
        source, text = source + _origin(found[0]), text[found.end() :]
    return source, text


def _origin(prefix: str) -> str:
    """A prefix less the time and place of a vLLM log call, which differ from line to line."""
    return "" if prefix.startswith(("ERROR", "CRITICAL")) else prefix.strip()


def _place(frames: Sequence[tuple[str, int]]) -> str:
    """The innermost frame in the user's or verl's code, else the innermost at all."""
    own = [frame for frame in frames if _is_own(frame[0])]
    path, number = (own or frames)[-1]
    return f"{_short(path)}:{number}"


def _is_own(path: str) -> bool:
    installed = _short(path)
    if installed != path:
        return installed.startswith(("verl/", "flashrl_cli/"))
    return path.startswith("/") and "/lib/python3" not in path


def _short(path: str) -> str:
    """A path less the folder of installed packages."""
    return PACKAGES.sub("", path)

"""Reads the logs of verl 0.9.1 and Ray 2.60: phases of a start, metrics, and the exception that caused a failure.

`causes` explains why a run failed; this module finds where, in a log in which verl, Ray and vLLM nest and interleave
tracebacks. verl's console prints a step as `step:3 - critic/score/mean:0.5 - actor/pg_loss:np.float64(0.01) - …`
(verl/utils/logger/aggregate_logger.py:26), after a prefix of Ray's; these lines replace verl's metrics file where the
file is on another machine.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

ANSI = re.compile(r"\x1b\[[0-9;]*m")
IDLE_TALK = re.compile(r"engine is not available: |^(\([^)]*\) )?\s+warnings\.warn\(")
"""Warnings of every verl process as it starts, about engines that the run does not use
(verl/workers/engine/__init__.py).
"""
TOTAL_STEPS = re.compile(r"Total training steps: (\d+)")


def plain(line: str) -> str:
    """A log line without colour codes and trailing white space."""
    return ANSI.sub("", line).rstrip()


def notable(lines: Iterable[str]) -> list[str]:
    """Lines after `plain`, without empty ones and without the warnings of every start."""
    return [line for line in map(plain, lines) if line and not IDLE_TALK.search(line)]


def total_steps(line: str) -> int | None:
    """The number of steps that the run will have, if verl logs it in `line`."""
    found = TOTAL_STEPS.search(line)
    return int(found[1]) if found else None


class StartPhase(enum.Enum):
    """The phases of a run's start, in order: name, longest time in seconds, and texts of the log.

    The name is shown and written to run.json. A log line that contains one of the texts begins the phase. The times
    are about ten times what a large model takes on slow disks; None means the time limit of a step, for a validation
    and for the sampling of the first step.
    """

    VERL = ("starting verl", 600)
    RAY = ("starting Ray", 600, "[validate_config] All configuration checks passed")
    TRAINER = ("starting the trainer", 600, "Started a local Ray instance", "Connected to Ray cluster")
    DATA = ("loading the data", 1800, "{'actor_rollout_ref': ")
    # an autoscaler may have to start machines first; Ray itself waits forever
    WORKERS = ("placing the workers", 1800, "worker group kwargs:")
    POLICY = ("loading the policy", 1800, "create worker group")
    ENGINE = ("starting the rollout engine", 600, "actor and ref model engine initialized")
    ENGINE_LOAD = ("loading the rollout engine", 1800, "['serve',")
    CHECKPOINT = ("loading the checkpoint", 1800, "checkpoint engine manager initialized")
    FIRST_REFIT = ("sending weights to the rollout engine", 900, "all initialize finished, ready to fit")
    VALIDATION = ("validating the starting policy", None, "Creating file logger at")
    SAMPLING = ("sampling responses", None, "Initial validation metrics", "Training Progress:")

    def __init__(self, words: str, clock_s: float | None, *texts: str) -> None:
        self.words, self.clock_s, self.texts = words, clock_s, texts


def phase_after(line: str, current: StartPhase, *, validates: bool) -> StartPhase | None:
    """The phase that `line` begins; None if it begins none that is later than `current`.

    With several nodes, lines of earlier phases are repeated late. A run that `validates` does so before it samples; any
    other samples at once (verl/trainer/ppo/v1/trainer_base.py:439).
    """
    phases = list(StartPhase)
    later = phases[phases.index(current) + 1 :]
    found = next((phase for phase in later if any(text in line for text in phase.texts)), None)
    return StartPhase.SAMPLING if found is StartPhase.VALIDATION and not validates else found


STEP = re.compile(r"(?:^|\s)step:(\d+) - (.+)$")
WRAPPED = re.compile(r"^np\.\w+\((.*)\)$")
SEPARATOR = " - "


def read_line(line: str) -> tuple[int, dict[str, float | None]] | None:
    """Step and metrics of a line of verl's console, without colour codes; None for any other line."""
    found = STEP.search(line)
    if found is None:
        return None
    data: dict[str, float | None] = {}
    for pair in found[2].split(SEPARATOR):
        key, colon, text = pair.rpartition(":")
        number = _number(text.strip())
        if not colon or not key or number is None:
            return None
        data[key] = number if math.isfinite(number) else None
    return int(found[1]), data


def _number(text: str) -> float | None:
    wrapped = WRAPPED.match(text)
    bare = wrapped[1] if wrapped else text
    if bare in ("True", "False"):
        return float(bare == "True")
    try:
        return float(bare)
    except ValueError:
        return None


SOURCE = re.compile(
    r"(\((?:raylet\b[^()]*|[^()]*\bpid=\d+[^()]*)\) ?|\[rank\d+\]:(?: |$)"
    r"|(?:ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)"
)
"""Prefix with which Ray, torch and vLLM mark which process wrote a line."""
REPEATED = re.compile(r" \[repeated \d+x across cluster\].*$")
FRAME = re.compile(r'^\s+(?:\| )?File "(?P<path>[^"]+)", line (?P<line>\d+), in ')
EXCEPTION = re.compile(r"^(?:[a-z_]\w*\.)*[A-Z_]\w*(?::( .*)?)?$")
HEADER = re.compile(
    r"^(?:Traceback \(most recent call last\):|(?:ray\.exceptions\.RayTaskError\(\w+\): )?.*\bray::\S+\(\) \(pid=)"
)
PACKAGES = re.compile(r"^.*/(?:site|dist)-packages/")
FOLLOWS = re.compile(
    r"ActorDiedError|ActorUnavailableError|RayActorError|WorkerCrashedError|EngineDeadError|CancelledError"
    r"|KeyboardInterrupt|SystemExit|BrokenPipeError|Connection was likely closed|Engine core initialization failed"
    r"|WorkerProc initialization failed|cancelled|selected terminal groups with no materializable trajectories"
    r"|groups of responses have failed in a row"
)
"""Exceptions that are only consequences of another failure."""
EMPTY = re.compile(r"EngineDeadError|SystemExit")
"""Exceptions without information: one that refers to a stack trace, which a killed engine does not leave, and the
reaction to SIGTERM.
"""
UNFINISHED = re.compile(
    r":$|: \d+ validation errors? for \w+$|: Error\(s\) in loading state_dict for \w+:$|before finishing this task\.$"
)
DEATH = re.compile(r"Worker PID: (?P<pid>\d+) Worker exit type: \S+ Worker exit detail: (?P<why>[^.]+)")
"""Line that Ray logs about a process that died without an exception."""
CHECK = re.compile(
    r"^\((?P<name>\w+) pid=(?P<pid>\d+)[^)]*\) \[[^\]]+\] (?P<place>\w+\.cc:\d+): .*(?P<why>Check failed: .*)",
    re.MULTILINE,
)
"""Line with which Ray's C++ code ends a process that is in a state which it holds impossible."""
MAX_LENGTH = 300


@dataclass(frozen=True, slots=True)
class _Raised:
    number: int
    text: str
    place: str

    def __str__(self) -> str:
        return f"{self.text} ({self.place})"


def root_error(lines: Sequence[str]) -> str | None:
    """The exception that made a run fail, in one line with the file and line that raised it.

    It is the last exception of the log that is not merely a consequence of another process's end; of nested exceptions,
    the innermost. Without one it is the first Ray process that died. None if the log shows neither.
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
    """The first process whose death Ray's raylet logs, under the name that Ray gives it anywhere in the log.

    Where Ray's own code ended a process, why it did.
    """
    log = "\n".join(plain(line) for line in lines)
    if check := CHECK.search(log):
        return f"{check['name']} (pid {check['pid']}): {check['why']} ({check['place']})"
    death = DEATH.search(log)
    if death is None:
        return None
    pid = death["pid"]
    # the prefix of its lines, or Ray's ActorDiedError about one that wrote none
    named = re.search(rf"^\((\w+) pid={pid}[,)]|class_name: (\w+)\n(?:.*\n){{1,2}}.*\tpid: {pid}$", log, re.MULTILINE)
    name = named[1] or named[2] if named else "process"
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
    """An exception's line, joined with the next one if only that line explains the error."""
    whole = f"{text} {following.strip()}" if UNFINISHED.search(text) else text
    return whole if len(whole) <= MAX_LENGTH else whole[: MAX_LENGTH - 1] + "…"


def _split(line: str) -> tuple[str, str]:
    """Split a log line into the mark of the process that wrote it, and the text."""
    text, source = REPEATED.sub("", plain(line)), ""
    while found := SOURCE.match(text):
        source, text = source + _origin(found[0]), text[found.end() :]
    return source, text


def _origin(prefix: str) -> str:
    """The part of a prefix that identifies a process; empty for vLLM's, whose time and place change every line."""
    return "" if prefix.startswith(("ERROR", "CRITICAL")) else prefix.strip()


def _place(frames: Sequence[tuple[str, int]]) -> str:
    """`file:line` of the innermost frame in the user's, verl's or flashrl's code; else of the innermost frame."""
    own = [frame for frame in frames if _is_own(frame[0])]
    path, number = (own or frames)[-1]
    return f"{_short(path)}:{number}"


def _is_own(path: str) -> bool:
    installed = _short(path)
    if installed != path:
        return installed.startswith(("verl/", "flashrl_cli/"))
    return path.startswith("/") and "/lib/python3" not in path


def _short(path: str) -> str:
    """A path without the folder of installed packages."""
    return PACKAGES.sub("", path)

"""Calls of a user's reward function in a process of its own, which a call may crash, or keep beyond its time limit.

The process has neither the user's working folder nor the function's among the places of imports, because a run has
neither. It does not let the function's file print, nor fork the process: a run would write each line that is printed
into its log, and Ray's workers have threads that a fork does not copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import io
import itertools
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Self

from flashrl_cli import reward_function
from flashrl_cli.errors import Location, Problem
from flashrl_cli.reward_function import Call, Failed, Failure, Score
from flashrl_cli.worker.client import Process, group
from flashrl_cli.worker.server import end_with_parent

LIMIT_S = 60.0
"""Seconds that a call may take unless the user says otherwise."""
LOAD_LIMIT_S = 120.0
"""Seconds that executing the file may take, which may import large libraries."""
TRIED = 4
"""Rows of each file for which a function is called before it is used."""
ANSWERS = ("", "I do not know.")
"""Responses to each of these rows, besides its truth."""
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
_TIMED_OUT = "Timeout ("
"""Start of what faulthandler writes before it ends a process."""
_SHOWN = 80


class Scorer:
    """Calls a function, given as its file's text, in a process that is started again after a call that ended it."""

    def __init__(
        self, source: str, file: str, name: str, arguments: Mapping[str, Any] | None = None, limit_s: float = LIMIT_S
    ) -> None:
        self.file, self._limit_s = file, limit_s
        self._setup = {"source": source, "file": file, "name": name, "arguments": dict(arguments or {})}
        self._closing = contextlib.ExitStack()
        self._running: tuple[IO[bytes], IO[bytes], Process, IO[bytes]] | None = None
        self.died = False
        """Whether a call ended the process."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def load(self) -> Failure | None:
        """Start the process and load the function; the reason if that fails."""
        if self._running is not None:
            return None
        errors = self._closing.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  (closed with the process)
        argv = [sys.executable, "-P", "-m", __name__]
        process = self._closing.enter_context(group(argv, {**os.environ, **_ENVIRONMENT}, errors.fileno()))
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process has no pipes")
        self._running = process.stdin, process.stdout, process, errors
        answer = self._ask(self._setup | {"limit_s": self._limit_s}, "the file", LOAD_LIMIT_S)
        if isinstance(answer, Failure):
            self._stop()
            return answer
        return None

    def score(self, call: Call) -> Score | Failure:
        """The reward of a response, or why there is none."""
        failure = self.load()
        if failure is not None:
            return failure
        answer = self._ask(list(call), "a call", self._limit_s)
        return answer if isinstance(answer, Failure) else Score(answer["score"], answer["fields"])

    def _ask(self, request: Any, what: str, limit_s: float) -> dict[str, Any] | Failure:
        if self._running is None:
            raise RuntimeError("the process was not started")
        orders, answers, process, errors = self._running
        with contextlib.suppress(BrokenPipeError):
            orders.write(json.dumps(request, default=reward_function.plain).encode() + b"\n")
            orders.flush()
        line = answers.readline()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            failure = answer.get("failure")
            return Failure(**failure | {"trace": tuple(failure["trace"])}) if failure else answer
        code = process.wait()
        errors.seek(0)
        output = errors.read().decode(errors="replace").splitlines()
        self._stop()
        self.died = True
        return self._death(code, output, f"{what} takes longer than {limit_s:g} s")

    def _death(self, code: int, output: Sequence[str], late: str) -> Failure:
        """Why the process ended: what faulthandler wrote about its stack, or its exit code."""
        dumped = next((number for number, line in enumerate(output) if line.startswith(_TIMED_OUT)), None)
        if dumped is not None:
            own = re.compile(rf'File "{re.escape(self.file)}", line (\d+)')
            found = next((int(match[1]) for line in output[dumped:] if (match := own.search(line))), None)
            return Failure(what=f"hangs: {late}", line=found)
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return Failure(what=f"ends its process with {how}", trace=tuple(output[-reward_function.LONGEST_TRACE :]))

    def _stop(self) -> None:
        self._closing.close()
        self._running = None


def first(rows: Iterable[tuple[Location, Call]]) -> Iterator[tuple[Location, Call]]:
    """The calls by which a function is tried on the first of `rows`, each given as a call with no matter what response.

    A row is answered by its truth, by nothing, and by text without an answer.
    """
    for place, call in itertools.islice(rows, TRIED):
        for response in (str(call.ground_truth), *ANSWERS):
            yield place, call._replace(solution_str=response)


def trial(scorer: Scorer, calls: Iterable[tuple[Location, Call]]) -> list[Problem]:
    """Call a function for rows at their locations; problems of the function, each at its first row alone."""
    failure = scorer.load()
    if failure is not None:
        return [problem(failure, scorer.file)]
    found: dict[tuple[str, int | None], Problem] = {}
    for place, call in calls:
        outcome = scorer.score(call)
        if isinstance(outcome, Failure):
            key = (re.sub(r"\d+", "0", outcome.what), outcome.line)
            found.setdefault(key, problem(outcome, scorer.file, place, call))
            if scorer.died:
                break
    return list(found.values())


def problem(failure: Failure, file: str, place: Location | str | None = None, call: Call | None = None) -> Problem:
    """A failure as a problem at its line of the user's file, with the row and response, and the user's traceback."""
    asked = f", for {place}" if place else ""
    said = "" if call is None else f" and the response {reward_function.short(call.solution_str, _SHOWN)}"
    trace = "".join(f"\n    {line}" for line in failure.trace)
    return Problem(f"the reward function {failure.what}{asked}{said}{trace}", Location(file, failure.line))


class _Watch(io.TextIOBase):
    """Stands for stdout, and finds out whether the user's file prints or forks the process."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._fork = os.fork
        self._found: Failure | None = None
        self.loading = True

    def write(self, text: str) -> int:
        """Write to stderr."""
        frame = sys._getframe(1)
        if frame.f_code.co_filename == self._file and text.strip():
            printed = reward_function.short(text.strip(), _SHOWN)
            what = f"prints {printed}, which a run would log for each response"
            self._found = self._found or Failure(what=what, line=frame.f_lineno)
        return sys.stderr.write(text)

    def fork(self) -> int:
        """Fork as os.fork, unless the user's file asks for it itself, or anything does while the file is executed."""
        frame = sys._getframe(1)
        own = next((one for one in _stack(frame) if one.f_code.co_filename == self._file), None)
        if own is not None and (self.loading or own is frame):
            when = " while it is loaded" if self.loading else ""
            what = f"forks its process{when}, which does not work in a worker with threads"
            self._found = self._found or Failure(what=what, line=own.f_lineno)
            raise RuntimeError("a reward function cannot fork its process")
        return self._fork()

    def taken(self) -> Failure | None:
        """What was found since the last call."""
        found, self._found = self._found, None
        return found


def _stack(frame: Any) -> Iterator[Any]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _serve() -> None:
    """Load a function and score responses, given as lines of JSON on stdin, until stdin ends."""
    end_with_parent(signal.SIGKILL)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    orders = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(sys.stderr.fileno(), 1)
    os.chdir("/")
    setup = json.loads(orders.readline())
    limit_s = setup.pop("limit_s")
    watch = _Watch(setup["file"])
    sys.stdout = watch
    os.fork = os.forkpty = watch.fork  # type: ignore[assignment]

    def answer(document: Mapping[str, Any] | Failure) -> None:
        if isinstance(document, Failure):
            document = {"failure": dataclasses.asdict(document)}
        answers.write(json.dumps(document, default=reward_function.plain) + "\n")
        answers.flush()

    function = _limited(LOAD_LIMIT_S, watch, lambda: reward_function.load(**setup))
    answer(function if isinstance(function, Failure) else {})
    if isinstance(function, Failure):
        return
    watch.loading = False
    for line in orders:
        call = Call(*json.loads(line))
        score = _limited(limit_s, watch, lambda call=call: function(call))
        answer(score if isinstance(score, Failure) else score._asdict())


def _limited(limit_s: float, watch: _Watch, work: Any) -> Any:
    """What `work` returns, or the failure that it raises or that was found; the process ends after `limit_s`."""
    faulthandler.dump_traceback_later(limit_s, exit=True)
    try:
        result = work()
    except Failed as failed:
        return watch.taken() or failed.failure
    finally:
        faulthandler.cancel_dump_traceback_later()
    return watch.taken() or result


if __name__ == "__main__":
    _serve()

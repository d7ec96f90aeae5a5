"""Grader processes, in which verl and math-verify judge responses while other responses are generated.

A response can hang its grader: `10^{10^{10}}` in a box, or a regular expression in C code, which signal handlers cannot
interrupt. It then costs one grader process and some of its seconds, and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Self, TypeVar, TypeVarTuple

from flashrl_cli.errors import EnvironmentNotReady, RunFailed
from flashrl_cli.evals import grade
from flashrl_cli.machine import software, system
from flashrl_cli.worker.server import end_with_parent

if TYPE_CHECKING:
    from pebble import ProcessPool

    from flashrl_cli.evals.questions import Question
    from flashrl_cli.evals.results import Grade, Response

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVarTuple("A")

_PACKAGES = ("pebble", "math_verify", "verl")
_SERVER = "flashrl_cli.evals.grader_server"
LIMIT_S = 5.0
"""CPU seconds that grading one response may take."""
_CHUNK = 32
"""Number of responses in one message to a grader, and number that is graded again one by one if one of them hangs."""
_CHUNK_LIMIT_S = 2.0
"""CPU seconds that a chunk may take, which normally takes milliseconds; the responses of a slower chunk are graded
singly.
"""
_BY_THE_CLOCK = 12
"""Factor by which wall-clock time may exceed CPU time: a busy machine must not make a right answer wrong."""
_OWN_LOAD_S = 20.0
"""Seconds that a call of a user's reward function may take beyond its own limit, because the first one loads it."""
_TRIES = 3


class Limit(NamedTuple):
    """Most seconds that a call may take, of a CPU and by the clock."""

    cpu_s: float
    clock_s: float


def begin() -> None:
    """Prepare a grader: it ends with the command line, and on SIGTERM, even in C code, with all its children.

    Scorers of verl start processes with a separate time limit, which a fork keeps and a new import of verl would not.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)
    threading.Thread(target=_end_with_command_line, daemon=True).start()
    os.register_at_fork(after_in_child=partial(end_with_parent, signal.SIGKILL))
    with contextlib.suppress(OSError):  # when memory runs out, losing a grader costs least
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def run(most_cpu_s: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function` in a grader; the kernel ends it with SIGVTALRM after `most_cpu_s` CPU seconds, even in C."""
    signal.setitimer(signal.ITIMER_VIRTUAL, most_cpu_s)
    try:
        return function(*args, **kwargs)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _end_with_command_line() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class Graders:
    """`workers` processes that grade while this context is open; they start in the background, in about 7 s.

    Raises EnvironmentNotReady if a required package is missing. All methods may be called from any thread.
    """

    def __init__(self, *, workers: int) -> None:
        for package in _PACKAGES:
            if importlib.util.find_spec(package) is None:
                raise EnvironmentNotReady(f"{package} is not installed", hint=_install(package))
        self._workers = workers
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: set[Future[Any]] = set()
        self._pool = self._new_pool()
        self._starting = threading.Thread(target=self._start, daemon=True)

    def __enter__(self) -> Self:
        self._starting.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all graders without waiting for those that still import: they end after that, or with this process."""
        self._closed = True
        ending = threading.Thread(target=self._end, daemon=True)
        ending.start()
        if not self._starting.is_alive():
            ending.join()

    def grade(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Grade]:
        """One grade for each of `responses`, in their order; waits until all are graded.

        Raises EnvironmentNotReady if a scorer lacks a library, RunFailed if graders die repeatedly, CancelledError if
        they are ended meanwhile.
        """
        work = [(questions[response.question], response.response) for response in responses]
        size = max(1, min(_CHUNK, math.ceil(len(work) / self._workers)))
        chunks = [work[first : first + size] for first in range(0, len(work), size)]
        found: list[Grade] = []
        outcomes = self._call_all(_limit(work, _CHUNK_LIMIT_S), grade.grade_all, [(chunk,) for chunk in chunks])
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            found += self._singly(chunk) if isinstance(outcome, Exception) else outcome
        return found

    def _singly(self, chunk: Sequence[tuple[Question, str]]) -> list[Grade]:
        """Grades of a chunk that failed because of one response; keeps verl's verdict if the comparison failed."""
        limit, usual = _limit(chunk, LIMIT_S), _limit((), LIMIT_S)
        verdicts = self._call_all(limit, grade.judge, chunk)
        readings = self._call_all(usual, grade.read, chunk)
        return [
            grade.joined(
                grade.Verdict(problem=_why(verdict, limit)) if isinstance(verdict, Exception) else verdict,
                grade.unread(*one, _why(reading, usual)) if isinstance(reading, Exception) else reading,
            )
            for one, verdict, reading in zip(chunk, verdicts, readings, strict=True)
        ]

    def _call_all(self, limit: Limit, function: Callable[[*A], R], calls: Sequence[tuple[*A]]) -> list[R | Exception]:
        """The result of `function` for each of `calls`, or the exception with the reason why its grader was ended."""
        queued = [(call, self._queue(limit, function, call)) for call in calls]
        found: list[R | Exception] = []
        for call, future in queued:
            outcome = self._outcome(future, limit, function, call)
            found.append(outcome)
        return found

    def _outcome(self, future: Future[R], limit: Limit, function: Callable[[*A], R], call: tuple[*A]) -> R | Exception:
        """The result of a queued call, which is queued again if all graders died."""
        from pebble import ProcessExpired

        for _ in range(_TRIES):
            try:
                return future.result()
            except BrokenProcessPool:
                future = self._queue(limit, function, call)
            except (TimeoutError, ProcessExpired) as error:
                return error
            except ImportError as error:
                raise EnvironmentNotReady(f"responses cannot be graded: {error}", hint="flashrl doctor") from error
        raise RunFailed(f"all graders died, {_TRIES} times", hint="flashrl doctor reports how much memory is free")

    def _queue(self, limit: Limit, function: Callable[[*A], R], call: tuple[*A]) -> Future[R]:
        """Queue a call; if no grader is left, new ones are started first."""
        with self._lock:
            if self._closed:
                raise CancelledError
            try:
                future = self._schedule(limit, function, call)
            except RuntimeError:  # pebble abandons a pool when an idle grader dies
                threading.Thread(target=_stop, args=(self._pool,), daemon=True).start()
                self._pool = self._new_pool()
                future = self._schedule(limit, function, call)
            self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def _schedule(self, limit: Limit, function: Callable[[*A], R], call: tuple[*A]) -> Future[R]:
        return self._pool.schedule(run, args=(limit.cpu_s, function, *call), timeout=limit.clock_s)

    def _new_pool(self) -> ProcessPool:
        from pebble import ProcessPool

        system.check_sockets(os.environ)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([_SERVER])
        return ProcessPool(self._workers, initializer=begin, context=context)

    def _start(self) -> None:
        with contextlib.suppress(RuntimeError):  # on failure the first call starts them or reports the reason
            self._pool.active  # noqa: B018  (asking starts a pool)

    def _end(self) -> None:
        with self._lock:
            for future in tuple(self._waiting):
                future.cancel()
            _stop(self._pool)


def _stop(pool: ProcessPool) -> None:
    pool.stop()  # type: ignore[no-untyped-call]
    pool.join()


def _limit(work: Sequence[tuple[Question, str]], usual_s: float) -> Limit:
    """The limit of a call for `work`: `usual_s` of a CPU, or what the user's own function may take by the clock."""
    own = [question.reward.timeout_s for question, _ in work if question.reward]
    if not own:
        return Limit(usual_s, _BY_THE_CLOCK * usual_s)
    return Limit(max(own) + _OWN_LOAD_S, max(own) + _OWN_LOAD_S)


def _why(lost: Exception, limit: Limit) -> str:
    if isinstance(lost, TimeoutError):
        return f"grading took longer than {limit.clock_s:g} s"
    code = getattr(lost, "exitcode", None)
    if code == -signal.SIGVTALRM:
        return f"grading took more than {limit.cpu_s:g} s of a CPU"
    how = signal.Signals(-code).name if isinstance(code, int) and code < 0 else f"code {code}"
    return f"its grader ended with {how}: was memory short?"


def _install(package: str) -> str:
    return software.INSTALL if package == "verl" else software.install_extra("eval")

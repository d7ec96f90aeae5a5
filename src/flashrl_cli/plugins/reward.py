"""Calls the user's reward function in verl's reward workers, and reports the first failure of it.

verl finds this module through its own key `reward.custom_reward_function.path`. If a reward function raises, stock verl
0.9.1 logs verl's traceback and leaves the prompt out of the batch (verl/trainer/ppo/v1/agent_loop_tq.py:145); a NaN
becomes part of the advantages, and a call that hangs stops the run for ever. Here the row, the response and the user's
part of the traceback go into the attempt's folder, where the launcher finds them and ends the run (train/supervise.py).
If the launcher cannot read that folder, they are printed as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrl_cli import contract, files
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.reward_function import Call, Failed, Failure, RewardFunction, Score, Shipped, is_right, plain

SCHEMA_VERSION = 1
MARK = "FLASHRL_REWARD_FAILURE "
"""Start of a printed report within its line; Ray puts a prefix before it."""
TIMED_OUT = re.compile(r"(?:^|\s)Timeout \(\d+:\d\d:\d\d(?:\.\d+)?\)!$")
"""The line that faulthandler writes before the stacks of all threads."""
LONGEST_RESPONSE = 2000
"""Characters of a response that a report holds."""
GRACE_S = 5.0
"""Seconds after the time limit of a call until faulthandler reports one that lets no other thread run."""
LOOK_S = 1.0
"""Seconds between two looks at the calls under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Why a reward function gave no reward, and for which response: the fields of a Call, or nothing if not known."""

    what: str
    line: int | None
    trace: tuple[str, ...]
    file: str
    call: Mapping[str, Any]
    schema_version: int = SCHEMA_VERSION


def write(folder: Path, report: Report) -> None:
    """Write a report into an attempt's folder unless there is one already, and print it if ENV_PRINT is set."""
    path = AttemptPaths(folder).reward_failure
    with contextlib.suppress(OSError):  # of a disk that the launcher does not read either
        if not path.exists():
            files.write_json(path, dataclasses.asdict(report))
    if os.environ.get(contract.ENV_PRINT):
        print(MARK + json.dumps(dataclasses.asdict(report)), flush=True)


def read(folder: Path) -> Report | None:
    """The report in an attempt's folder; None if there is none."""
    try:
        return _report(json.loads(AttemptPaths(folder).reward_failure.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def printed(line: str) -> Report | None:
    """The report in a line of a log; None for any other line."""
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    try:
        return _report(json.loads(text))
    except (ValueError, TypeError, KeyError):
        return None


class Frozen:
    """Finds in a log, line by line, where faulthandler says that a call lets no other thread run."""

    def __init__(self, shipped: Shipped) -> None:
        self._file, self._limit_s = shipped.file, shipped.timeout_s
        self._place = re.compile(rf'File "{re.escape(shipped.file)}", line (\d+) in ')
        self._dumped = False

    def take(self, line: str) -> Report | None:
        """The report that a line completes; it cannot say for which response."""
        self._dumped = self._dumped or TIMED_OUT.search(line) is not None
        found = self._place.search(line) if self._dumped else None
        if found is None:
            return None
        what = f"hangs: a call takes longer than {self._limit_s:g} s, in C code such as that of regular expressions"
        return Report(what=what, line=int(found[1]), trace=(), file=self._file, call={})


def _report(data: dict[str, Any]) -> Report | None:
    if data.get("schema_version") != SCHEMA_VERSION:
        return None
    return Report(**data | {"trace": tuple(data["trace"])})


def __getattr__(name: str) -> Any:
    """The function that verl calls: a coroutine function if the user's is one, so that its calls run concurrently."""
    if name != contract.REWARD[1]:
        raise AttributeError(name)
    return score_async if _function(Call("", "", None)).is_async else score


def score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> dict[str, Any]:
    """The reward of a response in the form of verl's scorers. Raises RuntimeError if there is none."""
    call = Call(data_source, solution_str, ground_truth, extra_info)
    if not _shipped().scores(data_source):
        return _by_verl(call)
    function = _function(call)
    with _reported(call), _calls().timed(call):
        return _result(function(call))


async def score_async(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
) -> dict[str, Any]:
    """The same for a coroutine function."""
    call = Call(data_source, solution_str, ground_truth, extra_info)
    if not _shipped().scores(data_source):
        return await asyncio.get_running_loop().run_in_executor(None, _by_verl, call)
    function, limit_s = _function(call), _shipped().timeout_s
    with _reported(call):
        try:
            return _result(await asyncio.wait_for(function.scored(call), limit_s))
        except TimeoutError:
            raise Failed(Failure(what=f"hangs: a call takes longer than {limit_s:g} s")) from None


def _by_verl(call: Call) -> dict[str, Any]:
    """The reward of a response by verl's scorer, with the accuracy that verl's reward managers give it."""
    from verl.utils.reward_score import default_compute_score

    result = default_compute_score(*call)
    return result if isinstance(result, dict) else {"score": result, "acc": result}


def _result(score: Score) -> dict[str, Any]:
    """A score as verl's reward managers take it, with the accuracy that verl's validation reports."""
    return {"score": score.score, **score.fields, "acc": float(is_right(score, _shipped().threshold))}


@functools.cache
def _shipped() -> Shipped:
    return Shipped.here()


_loading = threading.Lock()


def _function(call: Call) -> RewardFunction:
    """The user's function, loaded once. Raises RuntimeError, for the response to `call`, if that fails."""
    with _loading, _reported(call):
        return _loaded()


@functools.cache
def _loaded() -> RewardFunction:
    return _shipped().load()


@contextlib.contextmanager
def _reported(call: Call) -> Iterator[None]:
    """Report a failure of the user's function, and raise RuntimeError with it in one line."""
    try:
        yield
    except Failed as failed:
        _report_failure(failed.failure, call)
        raise RuntimeError(f"the reward function {failed.failure.what}") from None


def _report_failure(failure: Failure, call: Call) -> None:
    folder = contract.plugin_dir()
    if folder is None:
        return
    shown = call._replace(solution_str=call.solution_str[:LONGEST_RESPONSE])
    document = json.loads(json.dumps(shown._asdict(), default=plain))
    write(folder.parent, Report(**dataclasses.asdict(failure), file=_shipped().file, call=document))


class _Calls:
    """Calls under way in this process's threads, which a thread of its own watches while there are any."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._running: dict[int, tuple[float, Call]] = {}
        self._watched = False

    @contextlib.contextmanager
    def timed(self, call: Call) -> Iterator[None]:
        """Context of a call of the user's function in this thread."""
        thread = threading.get_ident()
        with self._lock:
            self._running[thread] = time.monotonic(), call
            if not self._watched:
                self._watched = True
                self._expect_a_look()
                threading.Thread(target=self._watch, daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                del self._running[thread]

    def _watch(self) -> None:
        """Report a call that takes too long; if C code lets no thread run, faulthandler writes where it is."""
        while running := self._under_way():
            self._expect_a_look()
            now = time.monotonic()
            late = [(thread, call) for thread, (began, call) in running.items() if now - began > self._limit_s]
            for thread, call in late[:1]:
                _report_failure(_hanging(thread, self._limit_s), call)
            time.sleep(min(LOOK_S, self._limit_s / 4))
        faulthandler.cancel_dump_traceback_later()

    def _expect_a_look(self) -> None:
        """Have faulthandler write where the threads are if this is not called again in time."""
        faulthandler.dump_traceback_later(self._limit_s + GRACE_S, file=2)

    def _under_way(self) -> dict[int, tuple[float, Call]]:
        with self._lock:
            self._watched = bool(self._running)
            return dict(self._running)


@functools.cache
def _calls() -> _Calls:
    return _Calls(_shipped().timeout_s)


def _hanging(thread: int, limit_s: float) -> Failure:
    """The failure that a call in a thread takes too long, with the user's part of its stack."""
    stack = traceback.extract_stack(sys._current_frames().get(thread))
    file = _shipped().file
    own = [number for number, frame in enumerate(stack) if frame.filename == file]
    trace = traceback.format_list(stack[own[0] :]) if own else []
    lines = tuple(line for text in trace for line in text.rstrip("\n").split("\n"))
    line = stack[own[-1]].lineno if own else None
    return Failure(what=f"hangs: a call takes longer than {limit_s:g} s", line=line, trace=lines)

"""Check that truths can be matched: each is written as a right answer and scored by the training reward function.

verl's light scorers run in this process, on truths of limited length; the others run in a separate process, which the
kernel ends when one truth takes too long.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.verl import rewards
from flashrl_cli.worker.client import Process, group

Claim = tuple[str, Any]
"""A data source and one of its truths."""

LIMIT_S = 5.0
"""CPU seconds that scoring one truth may take in a separate process."""
_BY_THE_CLOCK = 12
"""Factor by which wall-clock time may exceed CPU time: a busy machine must not reject a good truth."""
_CHUNK = 256
_MOST_DEATHS = 5
"""Number of truths that may end their process before the remaining ones are given up."""
_HEAVY_IMPORT = "verl.utils.reward_score"
_ENVIRONMENT = {"VERL_USE_EXTERNAL_PLUGINS": "none", "CUDA_VISIBLE_DEVICES": ""}

_NUMBER = re.compile(r"([+-]?)(\d+|\d{1,3}(?:,\d{3})+|(?=\.\d))(?:\.(\d*))?", re.ASCII)
_ODD = re.compile(
    r"[+-]?[$€£]\s*[\d.,]+|[$€£]\s*[+-]?[\d.,]+|[+-]?[\d.,]+\s*(?:%|[$€£])"
    r"|[+-]?\d{1,3}(?:_\d{3})+|[+-]?(?:\d+\.?\d*|\.\d+)[eE][+-]?\d+",
    re.ASCII,
)


def plain_number(text: str) -> str | None:
    """The number as a response would write it (`1,234`, `+5`, `007`, `12.0`: 1234, 5, 7, 12); None if it is not one."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    sign, whole, fraction = found[1], found[2].replace(",", "").lstrip("0") or "0", (found[3] or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if sign == "-" and number != "0" else number


def is_odd_number(text: str) -> bool:
    """Whether it is a number in a form that right answers do not have: `$5`, `5%`, `1e3`, `1_234`, `½`, `１２`."""
    stripped = text.strip()
    if _ODD.fullmatch(stripped):
        return True
    return any(not c.isascii() and unicodedata.category(c).startswith("N") for c in stripped)


def unpaid(claims: Sequence[Claim]) -> dict[int, str]:
    """Reasons why verl's scorers would not give full reward to truths as answers, by position in `claims`.

    Data sources without a scorer, and those whose truths do not determine the right answer, are skipped. Raises
    EnvironmentNotReady if verl, or a library that one of its scorers needs, is not installed.
    """
    found: dict[int, str] = {}
    heavy: list[int] = []
    verdicts: dict[tuple[str, str], str | None] = {}
    for number, (source, truth) in enumerate(claims):
        scorer = rewards.scorer(source)
        if scorer is None or scorer.answer is None:
            continue
        if not scorer.light:
            heavy.append(number)
            continue
        key = (scorer.module, json.dumps(truth))  # 5 and '5' are scored differently
        if key not in verdicts:
            if not verdicts:
                rewards.require_verl()
            verdicts[key] = _here(source, truth)
        if (why := verdicts[key]) is not None:
            found[number] = why
    return found | _heavy(claims, heavy) if heavy else found


def _here(source: str, truth: Any) -> str | None:
    try:
        return verdict(source, truth)
    except ImportError as error:
        raise _not_ready(str(error)) from error


def _not_ready(why: str) -> EnvironmentNotReady:
    return EnvironmentNotReady(f"the truths cannot be scored: {why}", hint="flashrl doctor")


def verdict(source: str, truth: Any) -> str | None:
    """The reason why the scorer of `source` would not give full reward to `truth`; None if it does.

    Raises ImportError if the scorer lacks a library.
    """
    scorer = rewards.scorer(source)
    most = scorer.reads if scorer else rewards.LONGEST_TRUTH
    length = len(truth) if isinstance(truth, str) else len(json.dumps(truth))
    if length >= most:
        return f"is longer than the {most:,} characters that the scorer reads"
    try:
        points = rewards.points(source, truth)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  (scorers raise anything, and one truth is not the data set)
        return f"makes verl's scorer fail: {type(error).__name__}"
    if points != rewards.PAID_IN_FULL:
        return "written as a right answer, is not paid in full by verl's scorer"
    return None


def _heavy(claims: Sequence[Claim], numbers: Sequence[int]) -> dict[int, str]:
    """`unpaid` of the claims at `numbers`, in a process that any of them may crash."""
    rewards.require_verl()
    distinct: dict[str, list[int]] = {}
    for number in numbers:
        distinct.setdefault(json.dumps(claims[number]), []).append(number)
    found: dict[int, str] = {}
    for line, why in _judged(list(distinct)):
        found |= dict.fromkeys(distinct[line], why) if why is not None else {}
    return found


def _judged(lines: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each claim (a line of JSON) with its verdict; if a chunk ends its process, its claims are judged singly."""
    waiting = [list(lines[first : first + _CHUNK]) for first in range(0, len(lines), _CHUNK)][::-1]
    deaths = 0
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(_process())
        while waiting:
            chunk = waiting.pop()
            if deaths >= _MOST_DEATHS:
                yield from ((line, f"was not scored: {deaths} before it ended the scorer") for line in chunk)
                continue
            verdicts = _ask(process, chunk)
            if verdicts is not None:
                yield from zip(chunk, verdicts, strict=True)
                continue
            process = stack.enter_context(_process())
            if len(chunk) == 1:
                deaths += 1
                yield chunk[0], f"keeps verl's scorer busy for more than {LIMIT_S:g} s, or ends it"
            else:
                waiting += [[line] for line in reversed(chunk)]


def _ask(process: Process, chunk: Sequence[str]) -> list[str | None] | None:
    """Verdicts of a chunk; None if its process ended. Raises EnvironmentNotReady for a missing library."""
    with contextlib.suppress(BrokenPipeError):
        if process.stdin:
            process.stdin.write(f"[{','.join(chunk)}]\n".encode())
            process.stdin.flush()
    answer = process.stdout.readline() if process.stdout else b""
    if not answer:
        return None
    found = json.loads(answer)
    if isinstance(found, str):
        raise _not_ready(found)
    verdicts: list[str | None] = found
    return verdicts


def _process() -> contextlib.AbstractContextManager[Process]:
    return group([sys.executable, "-P", "-m", __name__, str(LIMIT_S)], {**os.environ, **_ENVIRONMENT})


def _serve(limit_s: float) -> None:
    """Judge chunks of claims, given as lines of JSON on stdin, until stdin ends.

    The alarm of a claim that takes too long ends this process, even in C code.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of scorers and libraries goes to stderr
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    missing = _imported()
    for line in sys.stdin:
        try:
            found = missing or [_timed(source, truth, limit_s) for source, truth in json.loads(line)]
        except ImportError as error:
            found = str(error)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _imported() -> str | None:
    """Import the scorers, without a time limit; returns an error message if that fails."""
    try:
        importlib.import_module(_HEAVY_IMPORT)
    except ImportError as error:
        return str(error)
    return None


def _timed(source: str, truth: Any, limit_s: float) -> str | None:
    if (scorer := rewards.scorer(source)) is not None:
        importlib.import_module(f"{_HEAVY_IMPORT}.{scorer.module}")
    limits = {signal.ITIMER_VIRTUAL: limit_s, signal.ITIMER_REAL: _BY_THE_CLOCK * limit_s}
    for timer, seconds in limits.items():
        signal.setitimer(timer, seconds)
    try:
        return verdict(source, truth)
    finally:
        for timer in limits:
            signal.setitimer(timer, 0)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))

"""Inside the processes that grade: the one that all are forked from, and each of them.

verl's import takes 7 s of a CPU. It is done once, in the process that forks; a grader that was killed comes back in milliseconds.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import ParamSpec, TypeVar

from flashrl_cli import cpu

P = ParamSpec("P")
R = TypeVar("R")

_SCORERS = ("gsm8k", "math_reward", "math_dapo", "prime_math")
_ENVIRONMENT = {"VERL_USE_EXTERNAL_PLUGINS": "none", "CUDA_VISIBLE_DEVICES": "", **cpu.THREADS}
_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl(2)."""


def prepare() -> None:
    """Make this process one that graders are forked from: silent, off GPUs, with all imported that grades.

    It must not have threads when it forks, so nothing here leaves one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.environ.update(_ENVIRONMENT)
    prepared = threading.Event()
    watch = threading.Thread(target=_end_with, args=(os.getppid(), prepared))
    watch.start()
    # whatever cannot be imported fails again in the graders, where the failure is told
    with contextlib.suppress(Exception):
        _import()
    prepared.set()
    watch.join()


def begin() -> None:
    """Of each grader: end when told to, even in C code, and with the command line, and take along what verl's scorers start.

    They start processes with a time limit of their own, which a fork keeps and a new import of verl would not.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)
    threading.Thread(target=_end_with_command_line, daemon=True).start()
    os.register_at_fork(after_in_child=_end_with_grader)
    with contextlib.suppress(OSError):  # where memory gets short, a grader is the least loss
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def run(most_cpu_s: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function`; the kernel ends this process with SIGVTALRM once that has taken `most_cpu_s` of a CPU, in C code too."""
    signal.setitimer(signal.ITIMER_VIRTUAL, most_cpu_s)
    try:
        return function(*args, **kwargs)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _import() -> None:
    for name in _SCORERS:
        importlib.import_module(f"verl.utils.reward_score.{name}")
    from math_verify import parse, verify

    # the parser learns its grammar by use
    verify(
        parse(r"\boxed{\frac{1}{2}}", parsing_timeout=None),
        parse("$x^2 = 1,000$", parsing_timeout=None),
        timeout_seconds=None,
    )


def _end_with(parent: int, prepared: threading.Event) -> None:
    while not prepared.wait(0.1):
        if os.getppid() != parent:
            os._exit(1)


def _end_with_command_line() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _end_with_grader() -> None:
    import ctypes

    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)

"""The process that graders are forked from imports this module, and nothing else does: importing it prepares the process.

verl's import takes 7 s of a CPU. It is done once, here; a grader that was killed comes back in milliseconds. A module
of its own, because `multiprocessing` gives the process that forks nothing but names of modules to import.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading

from flashrl_cli import contract

_SCORERS = ("gsm8k", "math_reward", "math_dapo", "prime_math")
_ENVIRONMENT = {"VERL_USE_EXTERNAL_PLUGINS": "none", "CUDA_VISIBLE_DEVICES": "", **contract.THREADS}


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
    # whatever cannot be imported fails again in the graders, where the failure is reported
    with contextlib.suppress(Exception):
        _import()
    prepared.set()
    watch.join()


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


prepare()

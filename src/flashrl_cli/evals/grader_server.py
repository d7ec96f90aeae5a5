"""Prepares the process that graders are forked from; only that process imports this module.

verl's import takes 7 s of CPU time. It is done once, here, so that a grader that was killed is replaced in
milliseconds. This is a separate module because `multiprocessing` accepts only names of modules to import in the forking
process.
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
    """Make this process one that graders are forked from: silent, without GPUs, with all grading libraries imported.

    It must not have threads when it forks, so nothing here leaves one running.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.environ.update(_ENVIRONMENT)
    prepared = threading.Event()
    watch = threading.Thread(target=_end_with, args=(os.getppid(), prepared))
    watch.start()
    # imports that fail here fail again in the graders, which report the failure
    with contextlib.suppress(Exception):
        _import()
    prepared.set()
    watch.join()


def _import() -> None:
    for name in _SCORERS:
        importlib.import_module(f"verl.utils.reward_score.{name}")
    from math_verify import parse, verify

    # the first use makes the parser build its grammar
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

"""A process that works for the command line: started in a group of its own, given orders, heard, and ended with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flashrl_cli import contract, errors
from flashrl_cli.machine import system

LAST = frozenset({"done", "skipped", "restart"})
"""Events that end an order."""
_ENDING_S = 60.0
"""Seconds that the kernel may take to free the memory of a killed process on a busy machine."""

Died = Callable[[int, Path], errors.RunFailed]
"""The error for an exit code and a log."""


class Worker:
    """A running process that is given orders as lines of its stdin and tells of them as events on its stdout."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, died: Died) -> None:
        self._process, self._log, self._died = process, log, died

    @property
    def pid(self) -> int:
        """Its process id, which is that of its group."""
        return self._process.pid

    def ask(self, order: str) -> Iterator[dict[str, Any]]:
        """Give an order, one line of JSON; its events as they come, up to one of LAST.

        Raises the error that the process reports, or what tells why it died.
        """
        orders, events = self._process.stdin, self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # a process that died says why below
            if orders:
                orders.write(order.encode() + b"\n")
                orders.flush()
        for line in events or ():
            event = json.loads(line)
            if event["event"] == "error":
                raise _error(event)
            yield event
            if event["event"] in LAST:
                return
        raise self._died(self._process.wait(), self._log)


@contextlib.contextmanager
def worker(module: str, job: Path, log: Path, env: Mapping[str, str], died: Died) -> Iterator[Worker]:
    """`python -m module JOB`, with all other output going to the end of `log`. However the caller leaves, nothing stays running.

    Raises EnvironmentNotReady where it could not make its sockets.
    """
    system.check_sockets(env)
    with log.open("ab") as output, _process([sys.executable, "-m", module, str(job)], env, output.fileno()) as process:
        yield Worker(process, log, died)


def environment(
    plugins: Path, devices: str | None, fixed: Mapping[str, str], defaults: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Environment of a process with a vLLM engine: offline, with our plugin for vLLM, whose handshakes go to the folder `plugins`.

    `devices` are as in CUDA_VISIBLE_DEVICES; `fixed` variables are set whatever the user's environment says, `defaults` are not.
    """
    ours = {contract.ENV_PLUGIN_DIR: str(plugins), "HF_HUB_OFFLINE": "1"}
    visible = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    usual = {"VLLM_LOGGING_LEVEL": "WARNING", **contract.ENGINE, **(defaults or {})}
    return {**usual, **os.environ, **ours, **visible, **fixed}


@contextlib.contextmanager
def _process(argv: list[str], env: Mapping[str, str], log: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_ENDING_S)
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _error(event: Mapping[str, Any]) -> errors.FlashrlError:
    kind: type[errors.FlashrlError] = getattr(errors, event["kind"])
    return kind(event["message"], hint=event["hint"])

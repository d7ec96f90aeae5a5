"""The command line's side of the engine process: start it, give it orders, hear its events, end it and all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, cpu, errors
from flashrl_cli.evals import failures

if TYPE_CHECKING:
    from flashrl_cli.evals.job import Job, Order

ENGINE = "flashrl_cli.evals.engine"
LAST = frozenset({"done", "skipped"})
"""Events that end an order."""
_ENDING_S = 5.0


class Engine:
    """A running engine process."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log

    def fulfil(self, order: Order) -> Iterator[dict[str, Any]]:
        """Give an order; its events as they come, up to `done` or `skipped`.

        Raises the error that the engine reports, or RunFailed with the end of its log if it died.
        """
        orders, events = self._process.stdin, self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # a process that died says why below
            if orders:
                orders.write(order.line().encode() + b"\n")
                orders.flush()
        for line in events or ():
            event = json.loads(line)
            if event["event"] == "error":
                raise _error(event)
            yield event
            if event["event"] in LAST:
                return
        raise failures.died(self._process.wait(), self._log)


@contextlib.contextmanager
def engine(job: Job, log: Path, devices: str | None = None) -> Iterator[Engine]:
    """An engine for `job`, on the GPUs `devices` (as in CUDA_VISIBLE_DEVICES) if given; its output goes to `log`.

    However the caller leaves, nothing stays running.
    """
    file = job.work / "job.json"
    job.write(file)
    with log.open("ab") as output, _process(file, _environment(job, devices), output.fileno()) as process:
        yield Engine(process, log)


def _environment(job: Job, devices: str | None) -> dict[str, str]:
    """Environment of the engine: one process, offline, with our plugin for vLLM."""
    fixed = {
        contract.ENV_PLUGIN_DIR: str(job.work),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        **({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}),
    }
    defaults = {"VLLM_LOGGING_LEVEL": "WARNING", **cpu.ENGINE}
    return {**defaults, **os.environ, **fixed}


@contextlib.contextmanager
def _process(job: Path, env: Mapping[str, str], log: int) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-m", ENGINE, str(job)]
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

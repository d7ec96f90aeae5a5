"""The client side of a worker process: start it, send it orders, and end it with all its child processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashrl_cli import contract, files
from flashrl_cli.errors import RunFailed
from flashrl_cli.machine import system
from flashrl_cli.verl.causes import cause_in
from flashrl_cli.verl.logs import notable, root_error
from flashrl_cli.worker import protocol

ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Keeps vLLM's scheduler in the worker itself; a separate process costs memory and start-up time."""
_ENDING_S = 60.0
"""Time limit in seconds for the kernel to free the memory of a killed process on a busy machine."""
_READ_LINES = 400
_TAIL_LINES = 15
_WIDTH = 300


Process = subprocess.Popen[bytes]


class Worker:
    """A running worker process.

    `who` names it in messages; `hints` are fixes by the id of a cause (verl.causes), for the case that it dies.
    """

    def __init__(self, process: Process, log: Path, who: str, hints: Mapping[str, str]) -> None:
        self._process, self._log, self._who, self._hints = process, log, who, hints

    @property
    def pid(self) -> int:
        """Its process id, which is also its group's."""
        return self._process.pid

    def ask(self, order: Mapping[str, Any], *, limit_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Send an order and yield its events as they arrive, up to one of protocol.LAST.

        Raises the error that the process reports, and RunFailed if it died or did not finish the order within `limit_s`
        seconds.
        """
        orders, events = self._process.stdin, self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # why a process died is reported below
            if orders:
                orders.write(protocol.line(order).encode())
                orders.flush()
        with self._limited(limit_s) as late:
            for line in events or ():
                event = json.loads(line)
                if event["event"] == protocol.ERROR:
                    raise protocol.error_of(event)
                yield event
                if event["event"] in protocol.LAST:
                    return
        if late.is_set():
            raise RunFailed(f"{self._who} was not done within {limit_s:g} s")
        raise died(self._process.wait(), self._log, who=self._who, hints=self._hints)

    @contextlib.contextmanager
    def _limited(self, seconds: float | None) -> Iterator[threading.Event]:
        """Context in which the process is ended after `seconds`, which also sets the yielded event."""
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill_group(self._process)

        timer = threading.Timer(seconds, end) if seconds is not None else None
        if timer:
            timer.start()
        try:
            yield late
        finally:
            if timer:
                timer.cancel()


@contextlib.contextmanager
def worker(
    module: str,
    job: Mapping[str, Any],
    work: Path,
    log: Path,
    env: Mapping[str, str],
    *,
    who: str,
    hints: Mapping[str, str],
) -> Iterator[Worker]:
    """Run `python -P -m module JOB` as a worker, with the job's file in `work` and other output appended to `log`.

    With -P a file of the user's, such as a `regex.py` in the working folder, stands in for no installed package.

    No process is left when the context ends. Raises EnvironmentNotReady if the worker could not create its sockets.
    """
    system.check_sockets(env)
    argv = [sys.executable, "-P", "-m", module, str(protocol.write_job(work, job))]
    with log.open("ab") as output, group(argv, env, output.fileno()) as process:
        yield Worker(process, log, who, hints)


def environment(
    plugins: Path, devices: str | None, fixed: Mapping[str, str], defaults: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Environment of a process with a vLLM engine: offline, and with flashrl's plugin for vLLM.

    The plugin writes its handshakes to the folder `plugins`. `devices` is a value of CUDA_VISIBLE_DEVICES. `fixed`
    variables override the user's environment, `defaults` do not.
    """
    ours = {contract.ENV_PLUGIN_DIR: str(plugins), "HF_HUB_OFFLINE": "1"}
    visible = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    usual = {"VLLM_LOGGING_LEVEL": "WARNING", **contract.ENGINE, **(defaults or {})}
    return {**usual, **os.environ, **ours, **visible, **fixed}


@contextlib.contextmanager
def group(argv: Sequence[str], env: Mapping[str, str], stderr: int = subprocess.DEVNULL) -> Iterator[Process]:
    """Run a process with pipes to its stdin and stdout in a separate process group, which is killed at the end."""
    process = subprocess.Popen(
        argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
    )
    try:
        yield process
    finally:
        _kill_group(process)
        process.wait(_ENDING_S)
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _kill_group(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def died(code: int, log: Path, *, who: str, hints: Mapping[str, str]) -> RunFailed:
    """The error for a process that ended with exit code `code` before it had finished.

    `who` names it in the message; `hints` are fixes by the id of a cause (verl.causes).
    """
    lines = files.last_lines(log, _READ_LINES)
    cause = next((found for line in lines if (found := cause_in(line)) and found.id in hints), None)
    if cause:
        return RunFailed(f"{who} died: {cause.what}", hint=f"{hints[cause.id]}; its log: {log}")
    what = f"{who} ended with code {code}"
    if root := root_error(lines):
        return RunFailed(f"{what}: {root}", hint=f"its whole log: {log}")
    tail = "\n".join(f"  {line[:_WIDTH]}" for line in notable(lines)[-_TAIL_LINES:])
    return RunFailed(f"{what}:\n{tail}" if tail else f"{what}, its log is empty", hint=f"its whole log: {log}")

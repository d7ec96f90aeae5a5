"""The command line's side of a worker process: start it, give it orders, and end it with all that it started."""

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
"""Keeps vLLM's scheduler in the worker itself; a process of its own costs memory and the time to start it."""
_ENDING_S = 60.0
"""Seconds that the kernel may take to free the memory of a killed process on a busy machine."""
_READ_LINES = 400
_TAIL_LINES = 15
_WIDTH = 300


Process = subprocess.Popen[bytes]


class Worker:
    """A running worker process, `who` in messages; `hints` are fixes by a cause's id (verl.causes), for when it dies."""

    def __init__(self, process: Process, log: Path, who: str, hints: Mapping[str, str]) -> None:
        self._process, self._log, self._who, self._hints = process, log, who, hints

    @property
    def pid(self) -> int:
        """Its process id, which is that of its group."""
        return self._process.pid

    def ask(self, order: Mapping[str, Any], *, limit_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Give an order; its events as they come, up to one of protocol.LAST.

        Raises the error that the process reports, and RunFailed if it died or did not end the order within `limit_s`
        seconds.
        """
        orders, events = self._process.stdin, self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # a process that died says why below
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
        """Within, the process is ended after `seconds`, which sets the event."""
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
    """`python -m module JOB`, with the job's file in the folder `work` and all other output at the end of `log`.

    However the caller leaves, nothing stays running. Raises EnvironmentNotReady where it could not make its sockets.
    """
    system.check_sockets(env)
    argv = [sys.executable, "-m", module, str(protocol.write_job(work, job))]
    with log.open("ab") as output, group(argv, env, output.fileno()) as process:
        yield Worker(process, log, who, hints)


def environment(
    plugins: Path, devices: str | None, fixed: Mapping[str, str], defaults: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Environment of a process with a vLLM engine: offline, and with flashrl's plugin for vLLM.

    The plugin's handshakes go to the folder `plugins`. `devices` are as in CUDA_VISIBLE_DEVICES; `fixed` variables are
    set whatever the user's environment says, `defaults` are not.
    """
    ours = {contract.ENV_PLUGIN_DIR: str(plugins), "HF_HUB_OFFLINE": "1"}
    visible = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    usual = {"VLLM_LOGGING_LEVEL": "WARNING", **contract.ENGINE, **(defaults or {})}
    return {**usual, **os.environ, **ours, **visible, **fixed}


@contextlib.contextmanager
def group(argv: Sequence[str], env: Mapping[str, str], stderr: int = subprocess.DEVNULL) -> Iterator[Process]:
    """A process with pipes to its stdin and stdout, in a group of its own, which is killed when the caller leaves."""
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
    """The error for a process `who` that ended with exit code `code` before its work was done; `hints` by a cause's id."""
    lines = files.last_lines(log, _READ_LINES)
    cause = next((found for line in lines if (found := cause_in(line)) and found.id in hints), None)
    if cause:
        return RunFailed(f"{who} died: {cause.what}", hint=f"{hints[cause.id]}; its log: {log}")
    what = f"{who} ended with code {code}"
    if root := root_error(lines):
        return RunFailed(f"{what}: {root}", hint=f"its whole log: {log}")
    tail = "\n".join(f"  {line[:_WIDTH]}" for line in notable(lines)[-_TAIL_LINES:])
    return RunFailed(f"{what}:\n{tail}" if tail else f"{what}, its log is empty", hint=f"its whole log: {log}")

"""The command line's side of the engine process: start it, hear its events, end it and all that it started."""

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

if TYPE_CHECKING:
    from flashrl_cli.evals.job import Job

ENGINE = "flashrl_cli.evals.engine"
_TAIL_LINES = 15
_ENDING_S = 5.0


def events(job: Job, log: Path) -> Iterator[dict[str, Any]]:
    """Run an engine on `job`, yielding its events as they come; its output goes to `log`.

    Raises the error that the engine reports, or RunFailed with the end of its log. However the caller leaves, nothing
    stays running.
    """
    file = job.work / "job.json"
    job.write(file)
    with log.open("ab") as output, _process(file, _environment(job), output.fileno()) as process:
        for line in process.stdout or ():
            event = json.loads(line)
            if event["event"] == "error":
                raise _error(event)
            yield event
        if code := process.wait():
            raise errors.RunFailed(
                f"the evaluation engine ended with code {code}:\n{_tail(log)}", hint=f"its whole log: {log}"
            )


def _environment(job: Job) -> dict[str, str]:
    """Environment of the engine: one process, offline, plugins on for vLLM and off for verl (its scorers need none)."""
    fixed = {
        contract.ENV_PLUGIN_DIR: str(job.work),
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
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
                pipe.close()


def _error(event: Mapping[str, Any]) -> errors.FlashrlError:
    kind: type[errors.FlashrlError] = getattr(errors, event["kind"])
    return kind(event["message"], hint=event["hint"])


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line[:300]}" for line in lines[-_TAIL_LINES:])

"""The command line's side of the engine process: start it, give it orders, hear its events, end it and all that it started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli.evals import failures
from flashrl_cli.evals.process import Worker, environment, worker

if TYPE_CHECKING:
    from flashrl_cli.evals.job import Job, Order

ENGINE = "flashrl_cli.evals.engine"
_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class Engine:
    """A running engine process."""

    def __init__(self, process: Worker) -> None:
        self._process = process

    def fulfil(self, order: Order) -> Iterator[dict[str, Any]]:
        """Give an order; its events as they come, up to `done`, `skipped` or `restart`.

        Raises the error that the engine reports, or RunFailed with the end of its log if it died.
        """
        return self._process.ask(order.line())


@contextlib.contextmanager
def engine(job: Job, log: Path, devices: str | None = None) -> Iterator[Engine]:
    """An engine for `job`, on the GPUs `devices` (as in CUDA_VISIBLE_DEVICES) if given; its output goes to `log`.

    However the caller leaves, nothing stays running.
    """
    file = job.work / "job.json"
    job.write(file)
    with worker(ENGINE, file, log, environment(job.work, devices, _ONE_PROCESS), failures.died) as process:
        yield Engine(process)

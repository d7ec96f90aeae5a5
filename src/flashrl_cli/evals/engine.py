"""The process that holds the model: `python -m flashrl_cli.evals.engine JOB.json`.

One vLLM engine serves all checkpoints of an architecture. It runs apart from the command line so that torch and vLLM are imported
once, here, and so that everything it starts can be ended as one process group. It ends when the other end of its stdin
closes: a command line that was killed leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import ExitCode, FlashrlError
from flashrl_cli.evals import results
from flashrl_cli.evals.job import Job, Order
from flashrl_cli.weights import Unreadable
from flashrl_cli.worker import server

if TYPE_CHECKING:
    from flashrl_cli.evals.generate import Generator


def main() -> None:
    """Work through the orders on stdin, telling the progress on stdout."""
    orders, emit = server.begin()
    try:
        _serve(Job.read(Path(sys.argv[1])), orders, emit)
    except FlashrlError as error:
        server.end(emit, error)


def _serve(job: Job, orders: server.Orders, emit: server.Emit) -> None:
    """Fulfil orders until stdin closes, or until one has spoilt the engine or needs another."""
    from flashrl_cli.evals.generate import Generator, Outgrown, Spoilt

    emit("stage", text="starting the vLLM engine")
    prompts = [[q["prompt"] for q in _read_lines(job.questions(number))] for number in range(job.data_sets)]
    generator: Generator | None = None
    while True:
        order = Order.parse(orders.get())
        try:
            generator = generator or Generator(job, [prompt for data in prompts for prompt in data])
            _fulfil(order, generator, prompts[order.data], emit)
        except Outgrown:
            emit("restart")
            os._exit(ExitCode.OK)
        except Unreadable as error:
            ends = generator is None or isinstance(error, Spoilt)
            emit("skipped", reason=str(error), ends=ends)
            if ends:
                os._exit(ExitCode.OK)


def _fulfil(order: Order, generator: Generator, prompts: list[Any], emit: server.Emit) -> None:
    started = time.perf_counter()
    emit("loaded", holds=generator.load(order.weights))
    left = {number: prompt for number, prompt in enumerate(prompts) if number not in set(order.answered)}
    for samples in generator.answer(left):
        results.append(order.answers, samples)
        emit("advance", prompts=1, tokens=sum(sample.tokens for sample in samples))
    emit("done", seconds=round(time.perf_counter() - started, 3))


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


if __name__ == "__main__":
    main()

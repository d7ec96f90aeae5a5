"""The engines of an evaluation, which work on their orders at the same time, each on GPUs of its own."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import RunFailed
from flashrl_cli.evals import job
from flashrl_cli.evals.job import EngineSettings, Job, Order, Sampling
from flashrl_cli.weights import read_json

if TYPE_CHECKING:
    from flashrl_cli.evals.cache import Unit
    from flashrl_cli.evals.questions import DataSet, Prompting
    from flashrl_cli.runs.checkpoints import Checkpoint
    from flashrl_cli.worker.client import Worker

# Keys of config.json that saving a policy again may change, and that responses do not depend on here.
_VOLATILE = frozenset({
    "_name_or_path", "dtype", "torch_dtype", "attn_implementation", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
})  # fmt: skip


def architecture(checkpoint: Checkpoint) -> str:
    """The properties that two checkpoints must share to use one engine: config.json without what saving changes.

    Quantized weights can only be loaded when an engine starts, so each needs a separate one. Raises Unreadable without
    a config.
    """
    config = read_json(checkpoint.hf / "config.json")
    alone = str(checkpoint.hf) if checkpoint.quantized else ""
    return json.dumps({**{k: v for k, v in config.items() if k not in _VOLATILE}, "": alone}, sort_keys=True)


@dataclass(slots=True)
class _Running:
    """The running engine, and the architecture of the checkpoints that it can load."""

    architecture: str
    engine: Worker
    closing: contextlib.ExitStack


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What every engine of an evaluation is asked: the data sets, and how their questions are put and answered."""

    data: Sequence[DataSet]
    sampling: Sampling
    prompting: Prompting


class Slot:
    """A place for one engine at a time, on the GPUs `devices` (in the form of CUDA_VISIBLE_DEVICES).

    An engine is started for the architecture of the first order, and again for another one. Orders are worked on one
    after the other in a thread; `reports` receives (slot, unit, event) for each event (evals.job), and at the end of an
    order (slot, unit, Future) with the error that ended it, if any.
    """

    def __init__(
        self,
        number: int,
        asked: Asked,
        *,
        settings: EngineSettings,
        devices: str | None,
        log: Path,
        reports: SimpleQueue[tuple[Slot, Unit, dict[str, Any] | Future[None]]],
    ) -> None:
        self.number = number
        self._asked, self._settings, self._devices, self._log = asked, settings, devices, log
        self._reports = reports
        self._up: _Running | None = None
        self._closed = False
        self._changing = threading.Lock()
        self._thread = ThreadPoolExecutor(1)

    def can_load(self, wanted: str) -> bool:
        """Whether an engine is running for the architecture `wanted`."""
        up = self._up
        return up is not None and up.architecture == wanted

    def give(self, unit: Unit, order: Order, wanted: str) -> None:
        """Work on an order for a unit of the architecture `wanted`."""
        future = self._thread.submit(self._work, unit, order, wanted)
        future.add_done_callback(lambda done: self._reports.put((self, unit, done)))

    def close(self) -> None:
        """End the engine, whatever it is doing, and accept no further orders."""
        with self._changing:
            self._closed = True
            self._stop()
        self._thread.shutdown(cancel_futures=True)

    def _work(self, unit: Unit, order: Order, wanted: str) -> None:
        if not self.can_load(wanted):
            self._start(unit.checkpoint, wanted)
        for event in self._events(unit.checkpoint, order):
            if event["event"] == "skipped" and event["ends"]:
                with self._changing:
                    self._stop()
            self._reports.put((self, unit, event))

    def _events(self, checkpoint: Checkpoint, order: Order) -> Iterator[dict[str, Any]]:
        """Events of an order; if the engine requests it, from a new engine that starts with the checkpoint."""
        while up := self._up:
            for event in up.engine.ask(order.plain()):
                if event["event"] == "restart":
                    self._start(checkpoint, up.architecture)
                    break
                yield event
            else:
                return

    def _start(self, checkpoint: Checkpoint, wanted: str) -> None:
        """Replace the engine by one that starts with a checkpoint."""
        with self._changing, contextlib.ExitStack() as stack:
            self._stop()
            if self._closed:
                raise RunFailed("the evaluation was ended")
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flashrl-eval-")))
            made = Job(
                start=checkpoint.hf,
                quantized=checkpoint.quantized,
                work=work,
                data_sets=len(self._asked.data),
                sampling=self._asked.sampling,
                prompting=self._asked.prompting,
                engine=self._settings,
            )
            for number, data in enumerate(self._asked.data):
                made.write_questions(number, data.questions)
            engine = stack.enter_context(job.engine(made, self._log, self._devices))
            self._up = _Running(wanted, engine, stack.pop_all())

    def _stop(self) -> None:
        up, self._up = self._up, None
        if up:
            up.closing.close()

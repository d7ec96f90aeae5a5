"""Checkpoints, questions and a scripted engine for tests of the evaluation."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from flashrl_cli.evals import evaluation, job, results
from flashrl_cli.evals.evaluation import Progress
from flashrl_cli.evals.job import EngineSettings, Job, Order, Sampling
from flashrl_cli.evals.questions import DataSet, Prompting, Question
from flashrl_cli.evals.results import Evaluated, Grade, Response
from flashrl_cli.runs.checkpoints import Checkpoint
from flashrl_cli.weights import accounting

Script = Callable[[Job, Order], Iterator[dict[str, Any]]]
HOLDS = {"precision": "bf16", "kernel": "UnquantizedLinearMethod"}
QUESTION = Question([{"role": "user", "content": "1 + 1?"}], "openai/gsm8k", "2", None)


def checkpoint(folder: Path, step: int | None, **config: Any) -> Checkpoint:
    """An HF folder with a config and weights of its own."""
    hf = folder / str(step)
    hf.mkdir(parents=True)
    (hf / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 8, **config}))
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes([(step or 0) % 256])
    (hf / "model.safetensors").write_bytes(weights)
    return Checkpoint(source=folder, step=step, hf=hf, run="a")


def data(name: str = "sums", questions: int = 3) -> DataSet:
    """A data set with that many questions, each of its own."""
    made = [
        Question([{"role": "user", "content": f"{name} {i}?"}], "openai/gsm8k", str(i), None) for i in range(questions)
    ]
    return DataSet(name=name, file=Path(f"/data/{name}/test.parquet"), questions=tuple(made))


def response(question: int, text: str = "a\u2028b\x85c", sample: int = 0) -> Response:
    """A response of three tokens."""
    return Response(question=question, sample=sample, response=text, tokens=3, cut=False)


def evaluated(one: Checkpoint, data: DataSet) -> Evaluated:
    """Every question answered right."""
    responses = tuple(response(number) for number in range(len(data.questions)))
    grades = tuple(Grade(score=1.0, correct=True) for _ in responses)
    return Evaluated(checkpoint=one, data=data, responses=responses, grades=grades, holds=HOLDS, seconds=1.5)


def answer(job: Job, order: Order) -> Iterator[dict[str, Any]]:
    """What an engine does that answers everything it is asked."""
    yield {"event": "loaded", "holds": HOLDS}
    for number in order.questions:
        results.append(order.answers, [response(number, f"{order.weights.hf.name}: {number}")])
        yield {"event": "advance", "prompts": 1, "tokens": 3}
    yield {"event": "done", "seconds": 1.0}


class Graders:
    """Graders that find every response right; the class counts how many were started, and how many are up."""

    started = up = 0

    def __init__(self, *, workers: int) -> None:
        assert workers > 0

    def __enter__(self) -> Self:
        Graders.started += 1
        Graders.up += 1
        return self

    def __exit__(self, *_: object) -> None:
        Graders.up -= 1

    def grade(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Grade]:
        assert all(0 <= one.question < len(questions) for one in responses)
        return [Grade(score=1.0, correct=True) for _ in responses]


class Engines:
    """Replaces `job.engine`: each engine follows a script; `jobs` and `orders` are its inputs, `up` counts engines.

    `devices` has the GPUs of each job.
    """

    def __init__(self, script: Script = answer) -> None:
        self.script, self.jobs, self.orders, self.up = script, list[Job](), list[Order](), 0
        self.devices = list[str | None]()
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, job: Job, log: Path, devices: str | None = None) -> Iterator[Engine]:
        assert job.questions(job.data_sets - 1).is_file()
        with self.lock:
            self.jobs.append(job)
            self.devices.append(devices)
            self.up += 1
        try:
            yield Engine(self, job)
        finally:
            with self.lock:
                self.up -= 1


@dataclass(frozen=True)
class Engine:
    """One of the scripted engines."""

    of: Engines
    job: Job

    def ask(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        order = Order.of(asked)
        self.of.orders.append(order)
        yield from self.of.script(self.job, order)


def scripted(monkeypatch: pytest.MonkeyPatch) -> Engines:
    """Put Engines and Graders in place of an evaluation's own; nothing is known of any architecture's tensors."""
    found = Engines()
    monkeypatch.setattr(job, "engine", found)
    monkeypatch.setattr(evaluation, "Graders", Graders)
    monkeypatch.setattr(Graders, "started", 0)
    monkeypatch.setattr(Graders, "up", 0)
    monkeypatch.setattr(accounting, "_of_config", lambda text: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return found


class Reported:
    """What an evaluation reported."""

    def __init__(self) -> None:
        self.said, self.prompts, self.tokens = list[str](), 0, 0

    @property
    def progress(self) -> Progress:
        return Progress(say=self.said.append, advance=self._advance)

    def _advance(self, prompts: int, tokens: int) -> None:
        self.prompts += prompts
        self.tokens += tokens


SAMPLING, PROMPTING, ENGINE = Sampling(), Prompting(), EngineSettings()

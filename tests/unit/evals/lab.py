"""Checkpoints, questions and a scripted engine for tests of the evaluation."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flashrl_cli.evals import results
from flashrl_cli.evals.job import EngineSettings, Job, Order, Sampling
from flashrl_cli.evals.questions import Question
from flashrl_cli.evals.results import DataSet, Evaluated, Grade, Response
from flashrl_cli.evals.run import Telling
from flashrl_cli.runs.checkpoints import Checkpoint

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
    with job.questions(order.data).open(encoding="utf-8") as stream:
        count = sum(1 for _ in stream)
    for number in range(count):
        if number not in order.answered:
            results.append(order.answers, [response(number, f"{order.weights.hf.name}: {number}")])
            yield {"event": "advance", "prompts": 1, "tokens": 3}
    yield {"event": "done", "seconds": 1.0}


class AllRight:
    """A grader that finds every response right, and remembers how many it saw."""

    def __init__(self) -> None:
        self.seen = 0

    def grade(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Grade]:
        assert all(0 <= one.question < len(questions) for one in responses)
        self.seen += len(responses)
        return [Grade(score=1.0, correct=True) for _ in responses]


class Engines:
    """Stands in for `child.engine`: each engine follows a script; `jobs` and `orders` tell what was asked, `up` how many run."""

    def __init__(self, script: Script = answer) -> None:
        self.script, self.jobs, self.orders, self.up = script, list[Job](), list[Order](), 0

    @contextlib.contextmanager
    def __call__(self, job: Job, log: Path, devices: str | None = None) -> Iterator[Engines]:
        assert job.questions(job.data_sets - 1).is_file()
        self.jobs.append(job)
        self.up += 1
        try:
            yield self
        finally:
            self.up -= 1

    def ask(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        order = Order.of(asked)
        self.orders.append(order)
        yield from self.script(self.jobs[-1], order)


class Told:
    """What an evaluation told."""

    def __init__(self) -> None:
        self.said, self.prompts, self.tokens = list[str](), 0, 0

    @property
    def telling(self) -> Telling:
        return Telling(say=self.said.append, advance=self._advance)

    def _advance(self, prompts: int, tokens: int) -> None:
        self.prompts += prompts
        self.tokens += tokens


SAMPLING, ENGINE = Sampling(), EngineSettings()

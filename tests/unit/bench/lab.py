"""Requests to the benchmark without looking anything up, and workers that follow a script."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flashrl_cli.bench import job as variants
from flashrl_cli.bench.job import EngineOptions
from flashrl_cli.bench.request import Machine, Mismatch, Model, Request
from flashrl_cli.evals.questions import Question

OPTIONS = EngineOptions(
    tensor_parallel=1,
    max_num_seqs=16,
    max_model_len=112,
    gpu_memory_utilization=None,
    enforce_eager=True,
    kv_memory=None,
)
SHAPE = Model(name="shape:7b", config={"vocab_size": 9}, hf=None, fingerprint="shape")
HF = Model(name="tiny", config={"vocab_size": 9}, hf=Path("/hf"), fingerprint="weights")
QUESTION = Question([{"role": "user", "content": "1 + 1"}], "sums", "2", None)
MISMATCH = Mismatch(questions=(QUESTION,), samples=2, dtype="bfloat16", fingerprint="questions")
HOLDS = {
    "precision": "bf16",
    "quantized_layers": 8,
    "linear_layers": 8,
    "kernel": "Kernel",
    "kv_cache": "auto",
    "lm_head": "bf16",
    "smoothed": 0,
    "rotation": 0,
}
SCORE = {
    "tokens": 40,
    "abs_difference": {"mean": 0.01, "p99": 0.1, "max": 0.2},
    "kl": {"k1": 0.001, "k3": 0.002, "k3_error": 0.0005},
    "token_weights": {"mean": 1.0, "max": 3.0, "above_2": 0.025, "effective": 0.99},
    "knows_nothing": False,
}


def request(folder: Path, rollout: str = "bf16,int8", **changed: Any) -> Request:
    """Two batches of a shape on a CPU, kept in `folder`."""
    usual = Request(
        model=SHAPE,
        variants=variants.parse(rollout, None),
        batches=(4, 16),
        prompt=8,
        response=8,
        repeats=3,
        refit=False,
        mismatch=None,
        options=OPTIONS,
        engine=OPTIONS,
        longest=2048,
        devices=None,
        machine=Machine("cpu", "a CPU"),
        versions={"vllm": "0.28.0"},
        defaults=(),
        budget=None,
        folder=folder,
        fresh=False,
    )
    return replace(usual, **changed)


def facts(**holds: Any) -> dict[str, Any]:
    """What an engine says of itself."""
    return {"import_s": 1.0, "start_s": 2.0, "kv_tokens": 1000, "weights_bytes": 2**30, "holds": [{**HOLDS, **holds}]}


Answer = Callable[[str, dict[str, Any]], dict[str, Any]]


def obedient(precision: str, asked: dict[str, Any]) -> dict[str, Any]:
    """An engine that holds what was asked for; INT8 is twice as fast."""
    match asked["kind"]:
        case "start":
            return facts(precision=precision)
        case "speed":
            speed = asked["batch"] * (20.0 if precision == "int8" else 10.0)
            return {"tokens_s": speed, "values": [speed, speed + 1, speed - 1]}
        case "refit":
            return {"seconds": 0.1, "values": [0.1] * 5, "extra_bytes": None, "bytes": 10, "buckets": 1}
        case "sample":
            Path(asked["out"]).write_bytes(b"samples")
            return {"tokens": 40, "sequences": 2}
        case _:
            return SCORE


@dataclass
class Workers:
    """Stands in for `client.worker`: `asked` are kinds of orders by variant (or "scorer"), `running` counts those that
    are up."""

    answer: Answer = obedient
    asked: list[tuple[str, str]] = field(default_factory=list)
    environments: list[dict[str, str]] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0

    @contextlib.contextmanager
    def __call__(
        self, module: str, job: dict[str, Any], work: Path, log: Path, env: dict[str, str], **_: Any
    ) -> Iterator[Any]:
        self.running += 1
        assert self.running == 1, "two engines at once measure each other"
        self.environments.append(env)
        self.jobs.append(json.loads(json.dumps(job)))
        try:
            yield _Worker(self, log.stem)
        finally:
            self.running -= 1


@dataclass
class _Worker:
    workers: Workers
    name: str

    def ask(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.workers.asked.append((self.name, asked["kind"]))
        yield {"event": "advance", "note": "on the way"}
        yield {"event": "done", "result": self.workers.answer(self.name.partition("+")[0], asked)}

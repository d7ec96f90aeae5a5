"""The interface of the engine process: the job, and an order for each checkpoint and data set.

Events (worker.protocol) are `stage` (text), `loaded` (holds: a contract.Handshake), `advance` (prompts, tokens), and
one that ends the order: `done` (seconds), `skipped` (reason; ends: whether the process ends with it), or `restart`,
after which the process ends and a new one that starts with the order's checkpoint receives the order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashrl_cli.contract import AUTO
from flashrl_cli.evals.questions import UNCHANGED, Prompting, Question
from flashrl_cli.weights import Weights
from flashrl_cli.worker import client


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are sampled; temperature 0 is greedy, `top_k` 0 samples from all tokens.

    A response ends after `max_tokens` tokens, and before the first of the texts `stop` in it.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of the engine: `rollout` is the precision of the linear layers.

    `max_model_len` is in tokens, None for as many as the prompts need. `gpu_memory_utilization` is the share of each
    GPU's memory that vLLM takes, None for its default; `kv_memory` is the KV cache in GiB, None for what is left of it;
    `tensor_parallel` counts GPUs; `profile` is the absolute path of a smoothing profile. `rotation` is the block by
    which int8 rotates its inputs, 0 for none, `auto` for the default.
    """

    rollout: str = "bf16"
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    kv_memory: float | None = None
    tensor_parallel: int = 1
    profile: str | None = None
    rotation: int | str = AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One engine: `start` is an HF folder with its architecture; `quantized` is the weights' quantization method.

    `work` is a folder for the questions, with one file for each of the `data_sets` data sets.
    """

    start: Path
    quantized: str | None
    work: Path
    data_sets: int
    sampling: Sampling
    engine: EngineSettings
    prompting: Prompting = UNCHANGED

    def questions(self, number: int) -> Path:
        """File with the questions of data set `number`, one JSON object per line."""
        return self.work / f"questions-{number}.jsonl"

    def write_questions(self, number: int, questions: Sequence[Question]) -> None:
        """Write `questions` to the file of data set `number`."""
        self.questions(number).write_text("".join(q.line() + "\n" for q in questions), encoding="utf-8")

    def plain(self) -> dict[str, Any]:
        """The job as plain data."""
        return {**asdict(self), "start": str(self.start), "work": str(self.work)}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Job:
        """Restore a job from the data of `plain`."""
        places = {key: Path(data[key]) for key in ("start", "work")}
        sampling = Sampling(**{**data["sampling"], "stop": tuple(data["sampling"]["stop"])})
        prompting, engine = Prompting(**data["prompting"]), EngineSettings(**data["engine"])
        return cls(**{**data, **places, "sampling": sampling, "prompting": prompting, "engine": engine})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Answer the `questions` of data set `data` (by number) with `weights`, into the file `answers`."""

    weights: Weights
    data: int
    answers: Path
    questions: tuple[int, ...]

    def plain(self) -> dict[str, Any]:
        """The order as plain data."""
        data = {"data": self.data, "answers": str(self.answers), "questions": list(self.questions)}
        return {**data, "weights": self.weights.plain()}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Order:
        """Restore an order from the data of `plain`."""
        answers, questions = Path(data["answers"]), tuple(data["questions"])
        return cls(weights=Weights.of(data["weights"]), data=data["data"], answers=answers, questions=questions)


MODULE = "flashrl_cli.evals.engine"
HINTS = {
    "gpu-memory": "a smaller --max-model-len or --gpu-memory-utilization, or --tp over more GPUs",
    "gpu-occupied": "a smaller --gpu-memory-utilization, or another GPU by CUDA_VISIBLE_DEVICES",
    "gpu-shared": "a KV cache of a fixed size, by --kv-memory GIB",
    "kv-memory": "a smaller --max-model-len, or a larger --gpu-memory-utilization or --kv-memory",
    "model-length": "a smaller --max-tokens or --max-model-len",
}
"""Hints for an evaluation, by the id of a cause; verl.causes has the hints for a training run."""


@contextlib.contextmanager
def engine(job: Job, log: Path, devices: str | None = None) -> Iterator[client.Worker]:
    """Start an engine for `job`, which takes Orders; its output goes to `log`.

    `devices` has the form of CUDA_VISIBLE_DEVICES, None for all. However the caller leaves the context, no process is
    left.
    """
    env = client.environment(job.work, devices, client.ONE_PROCESS)
    who = "the evaluation engine"
    with client.worker(MODULE, job.plain(), job.work, log, env, who=who, hints=HINTS) as worker:
        yield worker

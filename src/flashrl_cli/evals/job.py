"""What the command line asks of its engine process, and the events that it answers with.

A job is a file, written before the process starts. Orders are JSON objects, one a line, on its stdin; the process ends itself when that
closes. Events are JSON objects, one a line, on its stdout, with a key `event`: `stage` (text), `loaded` (holds: a contract.Handshake),
`advance` (prompts, tokens), and one that ends the order: `done` (seconds), `skipped` (reason; ends: whether the process ends with it),
`restart`, with which the process ends and the order is given to one that starts with its checkpoint, or `error` (kind: a class in `errors`,
message, hint), with which the process ends.

Why an evaluation engine died, from its log, and which option of `flashrl eval` helps.

The command line's side of the engine process: start it, give it orders, hear its events, end it and all that it started.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.errors import RunFailed
from flashrl_cli.runs.metrics import last_lines
from flashrl_cli.verl.causes import cause_in
from flashrl_cli.verl.logs import root_error, telling
from flashrl_cli.weights import Weights
from flashrl_cli.worker.client import Worker, environment, worker

if TYPE_CHECKING:
    from flashrl_cli.evals.questions import Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn; temperature 0 is greedy. `max_tokens` bounds a response, in tokens."""

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How the engine runs: `rollout` is the precision of the linear layers, `max_model_len` (tokens) None means as the prompts need.

    `gpu_memory_utilization` is the share of each GPU's memory that vLLM takes, None its default; `tensor_parallel` counts GPUs;
    `profile` is the absolute path of a smoothing profile.
    """

    rollout: str = "bf16"
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel: int = 1
    profile: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One engine: `start` is the HF folder that says which architecture; `quantized` the method, if its weights are quantized already.

    `work` is a folder for the questions, one file for each of `data_sets` data sets.
    """

    start: Path
    quantized: str | None
    work: Path
    data_sets: int
    sampling: Sampling
    engine: EngineSettings

    def questions(self, number: int) -> Path:
        """Questions of data set `number`, one JSON object a line."""
        return self.work / f"questions-{number}.jsonl"

    def write_questions(self, number: int, questions: Sequence[Question]) -> None:
        """Write the file that `questions` names."""
        self.questions(number).write_text("".join(q.line() + "\n" for q in questions), encoding="utf-8")

    def write(self, path: Path) -> None:
        """Write the job to `path`."""
        files.write_json(path, {**asdict(self), "start": str(self.start), "work": str(self.work)})

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what `write` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        places = {key: Path(data[key]) for key in ("start", "work")}
        how = {"sampling": Sampling(**data["sampling"]), "engine": EngineSettings(**data["engine"])}
        return cls(**{**data, **places, **how})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Answer the questions of data set `data` by the checkpoint `weights`, but for `answered` ones, appending to the file `answers`."""

    weights: Weights
    data: int
    answers: Path
    answered: tuple[int, ...]

    def line(self) -> str:
        """The order as one line of JSON."""
        data = {"data": self.data, "answers": str(self.answers), "answered": self.answered}
        return json.dumps({**data, "weights": self.weights.plain()})

    @classmethod
    def parse(cls, line: str) -> Order:
        """The order that `line` made."""
        data = json.loads(line)
        answers, answered = Path(data["answers"]), tuple(data["answered"])
        return cls(weights=Weights.of(data["weights"]), data=data["data"], answers=answers, answered=answered)


HINTS = {
    "a GPU ran out of memory": "a smaller --max-model-len or --gpu-memory-utilization, or --tp over more GPUs",
    "a GPU has less free memory than the rollout engine asks for": (
        "a smaller --gpu-memory-utilization, or another GPU by CUDA_VISIBLE_DEVICES"
    ),
    "the rollout engine has no memory left for its KV cache": (
        "a smaller --max-model-len, or a larger --gpu-memory-utilization (on a CPU: VLLM_CPU_KVCACHE_SPACE, in GiB)"
    ),
    "prompt and response are longer than the model can take": "a smaller --max-tokens or --max-model-len",
}
"""What helps here, where verl.causes names a key of a training run."""
_READ_LINES = 400
_TAIL_LINES = 15
_WIDTH = 300


def died(code: int, log: Path, *, who: str = "the evaluation engine", hints: Mapping[str, str] = HINTS) -> RunFailed:
    """The error for a process `who` that ended with exit code `code` before its work was done; `hints` by cause."""
    lines = last_lines(log, _READ_LINES)
    cause = next((found for line in lines if (found := cause_in(line)) and found.what in hints), None)
    if cause:
        return RunFailed(f"{who} died: {cause.what}", hint=f"{hints[cause.what]}; its log: {log}")
    what = f"{who} ended with code {code}"
    if root := root_error(lines):
        return RunFailed(f"{what}: {root}", hint=f"its whole log: {log}")
    tail = "\n".join(f"  {line[:_WIDTH]}" for line in telling(lines)[-_TAIL_LINES:])
    return RunFailed(f"{what}:\n{tail}" if tail else what, hint=f"its whole log: {log}")


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
    with worker(ENGINE, file, log, environment(job.work, devices, _ONE_PROCESS), died) as process:
        yield Engine(process)

"""What the command line asks of its engine process, and the events that it answers with.

A job is a file, written before the process starts. Orders are JSON objects, one a line, on its stdin; the process ends itself when that
closes. Events are JSON objects, one a line, on its stdout, with a key `event`: `stage` (text), `loaded` (holds: a contract.Handshake),
`advance` (prompts, tokens), and one that ends the order: `done` (seconds), `skipped` (reason; ends: whether the process ends with it),
`restart`, with which the process ends and the order is given to one that starts with its checkpoint, or `error` (kind: a class in `errors`,
message, hint), with which the process ends.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.weights import Weights

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

"""What the command line asks of the processes that measure, as files and lines of JSON.

An engine process gets an EngineJob, a scorer a ScorerJob; orders are JSON objects with a key `kind`, one a line (`order`). Events are
`advance` (note), and one that ends the order: `done` (result) or `error` (kind, message, hint), with which the process ends.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from flashrl_cli import files


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How engines run: `kv_memory` in GiB (None: what is left of the memory), lengths in tokens, `tensor_parallel` in GPUs."""

    tensor_parallel: int
    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float | None
    enforce_eager: bool
    kv_memory: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """One engine: `arguments` are vLLM's for the variant, `weights` (a Weights as plain data) None where random ones are wanted.

    `questions` is a file of chat prompts, one a line, that get up to `response` tokens each later; for them the engine takes longer
    sequences than its options say, up to `longest`.
    """

    model: str
    weights: dict[str, Any] | None
    arguments: dict[str, Any]
    options: EngineOptions
    questions: str | None
    response: int
    longest: int | None

    def write(self, path: Path) -> None:
        """Write the job to `path`."""
        files.write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**data, "options": EngineOptions(**data["options"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerJob:
    """A model that judges tokens which others sampled: an HF folder, computed in `dtype` (bfloat16 or float32)."""

    model: str
    dtype: str

    def write(self, path: Path) -> None:
        """Write the job to `path`."""
        files.write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def order(kind: str, **asked: Any) -> str:
    """An order as one line of JSON."""
    return json.dumps({"kind": kind, **asked})

"""What an evaluation asks of its engine process (a JSON file), and the events that it answers with.

Events are JSON objects, one a line, with a key `event`: `stage` (text), `advance` (prompts), `done` (index, seconds),
`loaded` (index, holds: a contract.Handshake), `skipped` (index, reason), `error` (kind: a class in `errors`, message,
hint).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files

if TYPE_CHECKING:
    from flashrl_cli.runs.checkpoints import Checkpoint


def read_lines(path: Path) -> Iterator[Any]:
    """Objects of a file with one JSON object a line; responses hold characters that `str.splitlines` would split at."""
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn; temperature 0 is greedy. `max_tokens` bounds a response, in tokens."""

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One checkpoint to evaluate: `hf` has config and tokenizer, and the weights unless `shards` has them."""

    index: int
    hf: str
    shards: tuple[str, ...]

    @classmethod
    def of(cls, index: int, checkpoint: Checkpoint) -> Target:
        """The target that `checkpoint` is, under the number `index`."""
        return cls(index=index, hf=str(checkpoint.hf), shards=tuple(map(str, checkpoint.shards)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Checkpoints of one architecture for one engine; `work` is a folder for prompts, merged weights and responses.

    `rollout` is the precision of the linear layers; `max_model_len` (tokens) None means: as long as the prompts need.
    """

    targets: tuple[Target, ...]
    work: Path
    sampling: Sampling
    rollout: str
    max_model_len: int | None

    @property
    def questions(self) -> Path:
        """Questions, one JSON object a line."""
        return self.work / "questions.jsonl"

    def responses(self, index: int) -> Path:
        """Graded responses to the target number `index`, one JSON object a line."""
        return self.work / f"responses-{index}.jsonl"

    def write(self, path: Path) -> None:
        """Write the job to `path`."""
        files.write_json(path, {**asdict(self), "work": str(self.work)})

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what `write` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        targets = tuple(Target(**{**t, "shards": tuple(t["shards"])}) for t in data.pop("targets"))
        sampling = Sampling(**data.pop("sampling"))
        return cls(**{**data, "targets": targets, "sampling": sampling, "work": Path(data["work"])})

"""Sampled responses with the log-probs that the rollout gave them, kept in a file until the trainer's are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashrl_cli import files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Token ids of prompts and responses, and natural log-probs of each response's tokens at temperature 1."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]

    def write(self, path: Path) -> None:
        """Write to `path`, all sequences end to end."""
        kinds: dict[str, Any] = {"prompts": np.int32, "responses": np.int32, "logprobs": np.float64}
        arrays: dict[str, Any] = {}
        for name, kind in kinds.items():
            parts = getattr(self, name)
            arrays[name] = np.array([value for part in parts for value in part], dtype=kind)
            arrays[f"{name}_lengths"] = np.array([len(part) for part in parts], dtype=np.int64)
        with files.replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)

    @classmethod
    def read(cls, path: Path) -> Samples:
        """Read what `write` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{name: _split(stored, name) for name in ("prompts", "responses", "logprobs")})


def _split(stored: Any, name: str) -> list[Any]:
    ends = np.cumsum(stored[f"{name}_lengths"])
    return [part.tolist() for part in np.split(stored[name], ends[:-1])]

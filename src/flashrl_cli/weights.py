"""Whole bf16 tensors out of what lies on disk: an HF folder, verl's FSDP shards, a LoRA adapter on its base.

Used by the merge, and by the evaluation's vLLM worker, which must not import more of flashrl than this. torch is imported late.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Unreadable(Exception):
    """Weights that cannot be read, and why, with the file named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Where the weights of one checkpoint lie.

    In `shards` (in order of rank), else in the safetensors of `hf`, which has config and tokenizer in any case. With `adapter` (a folder
    as PEFT writes it, or the `actor/` of a LoRA run) the adapter is added to the weights of `base`, or to those in the shards.
    """

    hf: Path
    shards: tuple[Path, ...] = ()
    adapter: Path | None = None
    base: Path | None = None

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Name and whole bf16 tensor (on the CPU), one after another, under the names that Transformers gives them.

        Raises Unreadable for a torn file, a file with code in it, or shards that do not fit together.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raise Unreadable for what a look at the files' tables of contents shows to be torn; reads no tensors."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex digest that changes with any tensor, in milliseconds: from the shards' own checksums, else from samples of each tensor."""
        raise NotImplementedError

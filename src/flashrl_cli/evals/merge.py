"""Checkpoints as HF folders of their own: bf16 safetensors, written while they are read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flashrl_cli import files
from flashrl_cli.weights import Unreadable, Weights

__all__ = ["Unreadable", "check", "merge", "write"]

FILE_BYTES = 2**30
"""Size of one file of merged weights, which is in memory until it is written."""


def write(weights: Weights, target: Path) -> Path:
    """Write `target`: config and tokenizer of `weights`, and all its tensors as safetensors. Raises Unreadable."""
    weights.check()
    with files.replacing(target) as temporary:
        shutil.copytree(weights.hf, temporary, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "*.bin"))
        _save(temporary, weights.tensors())
    return target


def merge(hf: Path, shards: Sequence[Path], target: Path) -> Path:
    """`write` for the `shards` (in order of rank) that belong to `hf`."""
    return write(Weights(hf=hf, shards=tuple(shards)), target)


def check(hf: Path) -> Path:
    """`hf` itself, if its safetensors files are whole. Raises Unreadable."""
    Weights(hf=hf).check()
    return hf


def _save(folder: Path, tensors: Iterator[tuple[str, Any]]) -> None:
    """Write the tensors as safetensors files of about FILE_BYTES, and the index that names the file of each."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(_groups(tensors), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(group, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, name)
        total += sum(tensor.nbytes for tensor in group.values())
    files.write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _groups(tensors: Iterator[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    group: dict[str, Any] = {}
    size = 0
    for name, tensor in tensors:
        group[name] = tensor
        size += tensor.nbytes
        if size >= FILE_BYTES:
            yield group
            group, size = {}, 0
    if group:
        yield group

"""verl's FSDP shards to an HF folder, without running what a checkpoint file might carry.

Same tensors as `python -m verl.model_merger merge` (verl/model_merger/fsdp_model_merger.py): bfloat16, shards joined
along their placement, replicated copies taken once, tied names dropped. Unlike it, files are read with `weights_only`.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flashrl_cli import files

FILE_BYTES = 4 * 2**30
"""Size of one file of merged weights; together with the mapped shards it bounds the memory that a merge takes."""


class Unreadable(Exception):
    """A checkpoint that cannot be read, and why, with the file named."""


def merge(hf: Path, shards: Sequence[Path], target: Path) -> Path:
    """Write `target`: config and tokenizer of `hf`, and the weights of `shards` (in order of rank) as bf16 safetensors.

    Raises Unreadable for a torn file, a file with code in it, or shards that do not fit together.
    """
    with files.replacing(target) as temporary:
        shutil.copytree(hf, temporary, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "*.bin"))
        _save(temporary, _merged([_load(shard) for shard in shards], tied=_is_tied(hf)))
    return target


def check(hf: Path) -> Path:
    """`hf` itself, if all its safetensors files are whole; raises Unreadable naming the first that is not."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(hf.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise Unreadable(f"{file} is torn: {error}") from error
    return hf


def _load(file: Path) -> dict[str, Any]:
    import torch
    import torch.distributed.tensor  # registers DTensor and its parts as safe to load

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]
    except pickle.UnpicklingError as error:
        raise Unreadable(f"{file} holds more than weights, and loading it could run code; refused") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise Unreadable(f"{file} is torn or no checkpoint: {str(error).splitlines()[0]}") from error


def _is_tied(hf: Path) -> bool:
    return bool(json.loads((hf / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"))


def _merged(ranks: list[dict[str, Any]], *, tied: bool) -> Iterator[tuple[str, Any]]:
    """Name and whole bf16 tensor, one after another; a rank's part is let go as soon as it is used."""
    names = sorted(ranks[0])
    if any(sorted(rank) != names for rank in ranks):
        raise Unreadable("the shards do not hold the same parameters")
    if tied and "model.embed_tokens.weight" in names and "lm_head.weight" in names:
        names.remove("lm_head.weight")
    for name in names:
        yield name, _join(name, [rank.pop(name) for rank in ranks])


def _join(name: str, parts: list[Any]) -> Any:
    """One tensor from its parts in order of rank: joined along the sharded dimension, else the first copy."""
    import torch
    from torch.distributed.tensor import DTensor

    first = parts[0]
    if not isinstance(first, DTensor):
        if any(p.shape != first.shape or not torch.equal(p, first) for p in parts[1:]):
            raise Unreadable(f"{name} is not sharded, yet it differs between ranks")
        return first.bfloat16().contiguous()
    placement = first.placements[-1]  # a mesh of two dimensions is (replicas, shards)
    local = [p.to_local().bfloat16() for p in parts[: first.device_mesh.mesh.shape[-1]]]
    if placement.is_partial():
        raise Unreadable(f"{name} is a partial sum, not a shard")
    whole = torch.cat(local, dim=placement.dim) if placement.is_shard() else local[0]
    if whole.shape != first.shape:
        raise Unreadable(f"{name} is {tuple(whole.shape)} when joined, not {tuple(first.shape)}")
    return whole.contiguous()


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

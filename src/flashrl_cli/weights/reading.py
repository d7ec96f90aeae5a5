"""Tensors out of files, one at a time: a file is mapped, not read, and each tensor's part of it is let go when used.

Shards are joined as `python -m verl.model_merger merge` joins them (verl/model_merger/fsdp_model_merger.py): along their
placement, replicated copies taken once. Unlike there, files are read with `weights_only`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flashrl_cli.weights.contents import Unreadable

_DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64",
    "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip
"""Dtypes of torch's to safetensors' names for them."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor that is still in its file: what it will be (`dtype` as safetensors names it), and what reads it, whole and once."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]


Source = dict[str, Stored]
"""Tensors by their names."""
_FORBIDDEN = re.compile(r"GLOBAL (\S+)")


def from_safetensors(files: Iterable[Path]) -> Source:
    """The tensors of safetensors files as they are stored. Raises Unreadable for a torn file."""
    from safetensors import SafetensorError, safe_open

    source: Source = {}
    for file in files:
        try:
            opened: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise Unreadable(f"{file} is torn: {error}") from error
        source |= {name: _sliced(opened, name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return source


def _sliced(opened: Any, name: str) -> Stored:
    found = opened.get_slice(name)
    return Stored(shape=tuple(found.get_shape()), dtype=found.get_dtype(), read=partial(opened.get_tensor, name))


def from_shards(shards: Sequence[Path], *, exact: bool = False) -> Source:
    """The tensors that the state dicts of all ranks hold in parts, in bf16 or, `exact`, as they are stored.

    Raises Unreadable, here or when one is read.
    """
    ranks = [_load(shard) for shard in shards]
    if any(rank.keys() != ranks[0].keys() for rank in ranks):
        raise Unreadable(f"the shards in {shards[0].parent} do not hold the same parameters")
    return {name: _in_parts(name, ranks, exact=exact) for name in ranks[0]}


def _in_parts(name: str, ranks: list[dict[str, Any]], *, exact: bool) -> Stored:
    first = ranks[0][name]
    dtype = _DTYPES.get(str(first.dtype), str(first.dtype))
    read = partial(_join, name, ranks, exact=exact)
    return Stored(shape=tuple(first.shape), dtype=dtype if exact else _rounded_dtype(dtype), read=read)


def in_bf16(source: Source) -> Source:
    """`source` whose tensors are in bf16, as far as they are floating-point."""
    return {
        name: Stored(shape=one.shape, dtype=_rounded_dtype(one.dtype), read=partial(_read_in_bf16, one.read))
        for name, one in source.items()
    }


def _read_in_bf16(read: Callable[[], Any]) -> Any:
    return _rounded(read())


def _rounded_dtype(dtype: str) -> str:
    return "BF16" if dtype in FLOATS else dtype


def _rounded(tensor: Any) -> Any:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _load(file: Path) -> dict[str, Any]:
    import torch
    import torch.distributed.tensor  # noqa: F401 - registers DTensor and its parts as safe to load

    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = _FORBIDDEN.search(str(error))
        if named and named[1].startswith("torch."):
            what = f"a newer or older torch than {torch.__version__}, which does not know {named[1]}"
            raise Unreadable(f"{file} was saved by {what}; refused") from error
        what = f" ({named[1]})" if named else ""
        raise Unreadable(f"{file} holds more than weights{what}, and loading it could run code; refused") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise Unreadable(f"{file} is torn or no checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise Unreadable(f"{file} is no state dict: it holds other things than tensors by their names")
    return found


def _join(name: str, ranks: list[dict[str, Any]], *, exact: bool) -> Any:
    """One tensor from its parts, which the ranks let go: joined along the sharded dimension, else the first copy."""
    import torch
    from torch.distributed.tensor import DTensor

    parts = [rank.pop(name) for rank in ranks]
    first = parts[0]
    if all(isinstance(part, DTensor) for part in parts):
        return _joined(name, parts, exact=exact)
    if any(part.shape != first.shape or not torch.equal(part, first) for part in parts[1:]):
        raise Unreadable(f"{name} is not sharded, yet it differs between ranks")
    whole = first.contiguous()
    return whole if exact else _rounded(whole)


def _joined(name: str, parts: list[Any], *, exact: bool) -> Any:
    import torch

    first = parts[0]
    *outer, placement = first.placements  # a mesh of two dimensions is (replicas, shards)
    if placement.is_partial() or not all(one.is_replicate() for one in outer):
        raise Unreadable(f"{name} is placed as {first.placements}, not sharded along one dimension")
    mesh = first.device_mesh.mesh
    of_one_replica = mesh.reshape(-1, mesh.shape[-1])[0].tolist()
    if max(of_one_replica) >= len(parts):
        raise Unreadable(f"{name} is spread over {mesh.numel()} ranks, and there are shards of {len(parts)}")
    local = [parts[rank].to_local() for rank in of_one_replica]
    if not exact:
        local = [_rounded(part) for part in local]  # before they are joined, which takes half the memory
    whole = torch.cat(local, dim=placement.dim) if placement.is_shard() else local[0]
    if whole.shape != first.shape:
        raise Unreadable(f"{name} is {tuple(whole.shape)} when joined, not {tuple(first.shape)}")
    return whole.contiguous()

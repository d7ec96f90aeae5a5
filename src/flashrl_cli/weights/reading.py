"""Reading of tensors one at a time: files are memory-mapped, and each tensor's part is released after use.

Shards are joined as `python -m verl.model_merger merge` joins them (verl/model_merger/fsdp_model_merger.py): along
their placement, with replicated copies used once. Unlike there, files are read with `weights_only`.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Any

from flashrl_cli.weights.contents import Unreadable, table

_DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip
"""safetensors' names of torch's dtypes."""
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOATS = frozenset(_TORCH)
_PIECE = 2 * 2**20
"""Bytes in memory of a file that is being copied."""
_FORBIDDEN = re.compile(r"GLOBAL (\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor that is still in its file: its shape and `dtype` (as safetensors names it), and its one-time reader.

    `file` is the file, or the folder of the shards that hold it in parts. `parts` returns these as memory-mapped
    tensors, as often as it is called.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]
    file: Path | None = None
    parts: Callable[[], list[Any]] | None = None


Source = dict[str, Stored]
"""Stored tensors by name."""


def from_safetensors(files: Iterable[Path]) -> Source:
    """The tensors of safetensors files, with their stored dtypes. Raises Unreadable for a damaged file."""
    from safetensors import SafetensorError, safe_open

    source: Source = {}
    for file in files:
        try:
            opened: Any = safe_open(file, framework="pt")
        except FileNotFoundError as error:
            raise Unreadable(f"{file} is missing") from error
        except (SafetensorError, OSError) as error:
            raise Unreadable(f"{file} is torn: {error}") from error
        for name in opened.keys():  # noqa: SIM118 - no mapping
            if name in source:
                raise Unreadable(f"{name} is in two files: {source[name].file} and {file}")
            source[name] = _sliced(opened, name, file)
    return source


def _sliced(opened: Any, name: str, file: Path) -> Stored:
    found = opened.get_slice(name)
    read = partial(opened.get_tensor, name)
    return Stored(shape=tuple(found.get_shape()), dtype=found.get_dtype(), read=read, file=file, parts=lambda: [read()])


def copied(file: Path, target: Path) -> list[str]:
    """Copy a safetensors file to a new one, and return the names of its tensors with NaN or infinite values.

    Raises Unreadable if `file` cannot be read, and OSError if `target` cannot be written.
    """
    import torch

    entries, start = table(file)
    spans = sorted((*entry["data_offsets"], entry["dtype"], name) for name, entry in entries.items())
    if any(first != before for (first, *_), before in zip(spans, [0, *(last for _, last, *_ in spans)], strict=False)):
        raise Unreadable(f"{file} is torn: its tensors overlap, or there are gaps between them")
    bad: dict[str, None] = {}
    room = memoryview(bytearray(_PIECE))
    with file.open("rb", buffering=0) as source, target.open("xb") as out:
        out.write(_next(source, memoryview(bytearray(start)), file))
        for first, last, dtype, name in spans:
            for offset in range(first, last, _PIECE):
                data = _next(source, room[: min(_PIECE, last - offset)], file)
                out.write(data)
                if dtype in FLOATS and not is_finite(torch.frombuffer(data, dtype=getattr(torch, _TORCH[dtype]))):
                    bad[name] = None
    return list(bad)


def _next(source: RawIOBase, view: memoryview, file: Path) -> memoryview:
    """Fill `view` with the next bytes of a file. Raises Unreadable at the file's end."""
    done = 0
    while done < len(view):
        try:
            count = source.readinto(view[done:])
        except OSError as error:
            raise Unreadable(f"{file} cannot be read: {error.strerror or error}") from None
        if not count:
            raise Unreadable(f"{file} is torn: it became shorter while it was read")
        done += count
    return view


def from_shards(shards: Sequence[Path], *, exact: bool = False) -> Source:
    """The tensors whose parts are in the state dicts of all ranks, in bf16 or, if `exact`, in their stored dtype.

    Raises Unreadable, here or when a tensor is read.
    """
    ranks = [_load(shard) for shard in shards]
    everywhere = set.intersection(*map(set, ranks))
    for shard, rank in zip(shards, ranks, strict=True):
        if uneven := sorted(rank.keys() - everywhere):
            what = f"{uneven[0]} is in {shard.name} and not in all of them"
            raise Unreadable(f"the shards in {shard.parent} do not hold the same parameters: {what}")
    return {name: _in_parts(name, ranks, shards[0], exact=exact) for name in ranks[0]}


def _in_parts(name: str, ranks: list[dict[str, Any]], shard: Path, *, exact: bool) -> Stored:
    first = ranks[0][name]
    dtype = _DTYPES.get(str(first.dtype), str(first.dtype))
    return Stored(
        shape=tuple(first.shape),
        dtype=dtype if exact else _rounded_dtype(dtype),
        read=partial(_join, name, ranks, exact=exact),
        file=shard if len(ranks) == 1 else shard.parent,
        parts=lambda: [_local(rank[name]) for rank in ranks],
    )


def _local(part: Any) -> Any:
    """The local part of a tensor on one rank."""
    return part.to_local() if hasattr(part, "to_local") else part


def equal(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors have the same values.

    Raises ValueError for tensors that are computed while they are read.
    """
    if one.parts is None or other.parts is None:
        raise ValueError("only what is in a file can be compared before it is read")
    return all(_same(first, second) for first, second in zip(one.parts(), other.parts(), strict=True))


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors are equal: bit by bit, so that NaN equals itself, or as numbers if their dtypes differ."""
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return one.shape == other.shape and bool(torch.equal(one.float(), other.float()))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.itemsize, torch.uint8)
    return bool(torch.equal(one.view(bits), other.view(bits)))


def is_finite(tensor: Any) -> bool:
    """Whether a tensor has neither NaN nor infinite values, in one pass; 8-bit values and integers always pass."""
    import torch

    if (
        not tensor.is_floating_point() or tensor.itemsize < 2 or not tensor.numel()
    ):  # torch has no minimum of 8-bit floats
        return True
    # minimum and maximum propagate NaN; isfinite().all() takes 20 times as long
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(tensor)).tolist())


def in_bf16(source: Source) -> Source:
    """`source` with its floating-point tensors in bf16."""
    return {
        name: replace(one, dtype=_rounded_dtype(one.dtype), read=partial(_read_in_bf16, one.read), parts=None)
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
    """One tensor from its parts: joined along the sharded dimension, or else the first copy.

    The parts are removed from the ranks' state dicts.
    """
    from torch.distributed.tensor import DTensor

    parts = [rank.pop(name) for rank in ranks]
    first = parts[0]
    if all(isinstance(part, DTensor) for part in parts):
        return _joined(name, parts, exact=exact)
    if any(not _same(part, first) for part in parts[1:]):
        raise Unreadable(f"{name} is not sharded, yet it differs between ranks")
    whole = first.contiguous()
    return whole if exact else _rounded(whole)


def _joined(name: str, parts: list[Any], *, exact: bool) -> Any:
    import torch

    first = parts[0]
    *outer, placement = first.placements  # a device mesh with two dimensions is (replicas, shards)
    if placement.is_partial() or not all(one.is_replicate() for one in outer):
        raise Unreadable(f"{name} is placed as {first.placements}, not sharded along one dimension")
    mesh = first.device_mesh.mesh
    of_one_replica = mesh.reshape(-1, mesh.shape[-1])[0].tolist()
    if max(of_one_replica) >= len(parts):
        raise Unreadable(f"{name} is spread over {mesh.numel()} ranks, and there are shards of {len(parts)}")
    local = [parts[rank].to_local() for rank in of_one_replica]
    if not exact:
        local = [_rounded(part) for part in local]  # rounded before joining, which halves the memory
    whole = torch.cat(local, dim=placement.dim) if placement.is_shard() else local[0]
    if whole.shape != first.shape:
        raise Unreadable(f"{name} is {tuple(whole.shape)} when joined, not {tuple(first.shape)}")
    return whole.contiguous()

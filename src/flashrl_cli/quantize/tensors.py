"""A model's tensors in pieces: read out of their files by several threads, without mapping these, so that memory stays small."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli.quantize.arithmetic import Room
from flashrl_cli.quantize.shards import BYTES
from flashrl_cli.weights import HEAD, Stored, Unreadable, Weights, model_files, table, ties_head

if TYPE_CHECKING:
    import torch

BLOCK = 2 * 2**20
"""Bytes that one thread holds of a tensor."""
_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor of the model, `dtype` as safetensors names it: in `file` from byte `start` on, or made whole by `stored`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None
    start: int = 0
    stored: Stored | None = None
    whole: Any = None
    """The tensor itself, once it was made."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size as it is read."""
        return BYTES[self.dtype] * self.elements

    @property
    def origin(self) -> Path | None:
        """What it is read from, to name it."""
        return self.stored.file if self.stored else self.file

    def made(self) -> Tensor:
        """The same, in memory. Raises Unreadable."""
        if self.stored:
            return replace(self, stored=None, file=self.stored.file, whole=self.stored.read().contiguous())
        return replace(self, whole=Desk().elements(self, range(self.elements)).view(self.shape))

    def spans(self, step: int = 1) -> Iterator[range]:
        """Ranges of its elements of about BLOCK bytes, each a multiple of `step`."""
        size = max(1, BLOCK // (BYTES[self.dtype] * step)) * step
        for start in range(0, self.elements, size):
            yield range(start, min(start + size, self.elements))


def described(weights: Weights) -> dict[str, Tensor]:
    """All tensors of a model by name; a tied lm_head is left out. Reads no tensor. Raises Unreadable for what is torn or unknown."""
    plain = not (weights.shards or weights.adapter)
    found = dict(_in_files(weights.hf)) if plain else dict(_made(weights))
    for tensor in found.values():
        if tensor.dtype not in BYTES:
            raise Unreadable(
                f"{tensor.file or weights.hf}: {tensor.name} has the dtype {tensor.dtype}, which is unknown here"
            )
    if plain and ties_head(weights.hf, found):
        del found[HEAD]
    return found


def _in_files(hf: Path) -> Iterator[tuple[str, Tensor]]:
    for file in model_files(hf):
        entries, start = table(file)
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            tensor = Tensor(
                name=name, shape=tuple(entry["shape"]), dtype=entry["dtype"], file=file, start=start + first
            )
            if tensor.dtype in BYTES and tensor.bytes != last - first:
                raise Unreadable(f"{file} is torn: {name} is not as long as its shape says")
            yield name, tensor


def _made(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)  # a warning about torch.compile
    for name, stored in sorted(weights.source().items()):
        yield name, Tensor(name=name, shape=stored.shape, dtype=stored.dtype, stored=stored)


class Desk(threading.local):
    """Memory for one block, which a thread uses again and again."""

    def __init__(self) -> None:
        self._buffers: dict[str, bytearray] = {}
        self.room = Room()

    def elements(self, tensor: Tensor, span: range) -> torch.Tensor:
        """Elements of a tensor [len(span)], until this thread asks again. Raises Unreadable."""
        if tensor.whole is not None:
            flat: torch.Tensor = tensor.whole.view(-1)[span.start : span.stop]
            return flat
        return self.tensor(tensor.dtype, self._read(tensor, span))

    def converted(self, tensor: Tensor, span: range, dtype: str) -> memoryview:
        """The bytes of elements, in `dtype`."""
        if tensor.whole is None and tensor.dtype == dtype:
            return self._read(tensor, span)
        memory = self.memory("values", BYTES[dtype] * len(span))
        self.tensor(dtype, memory).copy_(self.elements(tensor, span))
        return memory

    def memory(self, use: str, size: int) -> memoryview:
        """`size` bytes of this thread's, the same for the same `use`."""
        buffer = self._buffers.get(use)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[use] = bytearray(size)
        return memoryview(buffer)[:size]

    @staticmethod
    def tensor(dtype: str, memory: memoryview) -> torch.Tensor:
        """A tensor [elements] that lies in `memory`."""
        import torch

        return torch.frombuffer(memory, dtype=getattr(torch, _TORCH[dtype]))

    def _read(self, tensor: Tensor, span: range) -> memoryview:
        if tensor.file is None:
            raise ValueError(f"{tensor.name} is in no file: it is made before it is read")
        size = BYTES[tensor.dtype]
        view = self.memory("source", size * len(span))
        try:
            _fill(view, tensor.file, tensor.start + size * span.start)
        except OSError as error:
            raise Unreadable(f"{tensor.file} cannot be read: {error.strerror or error}") from None
        return view


def _fill(view: memoryview, file: Path, start: int) -> None:
    """Read what lies in a file from byte `start` on. Raises OSError, and Unreadable where the file ends too early."""
    with file.open("rb", buffering=0) as stream:
        done = 0
        while done < len(view):
            count = os.preadv(stream.fileno(), [view[done:]], start + done)
            if not count:
                raise Unreadable(f"{file} is torn: it became shorter while it was read")
            done += count

"""Read and write a model's tensors in pieces with several threads, so that memory use stays small.

Files are read without memory mapping. In a new file, the offset of each tensor is fixed before the first byte is
written.
"""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from flashrl_cli.quantize.arithmetic import Room
from flashrl_cli.weights import HEAD, Stored, Unreadable, Weights, model_files, table, ties_head

if TYPE_CHECKING:
    import torch

BLOCK = 2 * 2**20
"""Bytes of a tensor that one thread holds at a time."""
_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Size of one element in bytes, by safetensors' names of dtypes."""
INDEX = "model.safetensors.index.json"
_ALIGNED = 8
_FORMAT = {"format": "pt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor of the model, in `file` from byte `start`, or made by `stored`; `dtype` is safetensors' name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None
    start: int = 0
    stored: Stored | None = None
    whole: Any = None
    """The tensor itself, once it is complete in memory."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes as it is read."""
        return BYTES[self.dtype] * self.elements

    @property
    def origin(self) -> Path | None:
        """The file that it is read from, for messages."""
        return self.stored.file if self.stored else self.file

    def made(self) -> Tensor:
        """The same tensor, in memory. Raises Unreadable."""
        if self.stored:
            return replace(self, stored=None, file=self.stored.file, whole=self.stored.read().contiguous())
        return replace(self, whole=Desk().elements(self, range(self.elements)).view(self.shape))

    def spans(self, step: int = 1) -> Iterator[range]:
        """Yield ranges of its elements of about BLOCK bytes, each a multiple of `step`."""
        size = max(1, BLOCK // (BYTES[self.dtype] * step)) * step
        for start in range(0, self.elements, size):
            yield range(start, min(start + size, self.elements))


def described(weights: Weights) -> dict[str, Tensor]:
    """All tensors of a model by name, without a tied lm_head; no tensor is read.

    Raises Unreadable for files that are truncated or of an unknown form.
    """
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
    """Memory for one block per thread, which is reused."""

    def __init__(self) -> None:
        self._buffers: dict[str, bytearray] = {}
        self.room = Room()

    def elements(self, tensor: Tensor, span: range) -> torch.Tensor:
        """Elements of a tensor [len(span)], valid until this thread calls it again. Raises Unreadable."""
        if tensor.whole is not None:
            flat: torch.Tensor = tensor.whole.view(-1)[span.start : span.stop]
            return flat
        return self.tensor(tensor.dtype, self._read(tensor, span))

    def converted(self, tensor: Tensor, span: range, dtype: str) -> memoryview:
        """The bytes of the elements, converted to `dtype`."""
        if tensor.whole is None and tensor.dtype == dtype:
            return self._read(tensor, span)
        memory = self.memory("values", BYTES[dtype] * len(span))
        self.tensor(dtype, memory).copy_(self.elements(tensor, span))
        return memory

    def memory(self, use: str, size: int) -> memoryview:
        """`size` bytes of memory of this thread, the same for equal `use`."""
        buffer = self._buffers.get(use)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[use] = bytearray(size)
        return memoryview(buffer)[:size]

    @staticmethod
    def tensor(dtype: str, memory: memoryview) -> torch.Tensor:
        """A tensor [elements] that shares `memory`."""
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
    """Fill `view` from byte `start` of a file. Raises OSError, and Unreadable if the file ends too early."""
    with file.open("rb", buffering=0) as stream:
        done = 0
        while done < len(view):
            count = os.preadv(stream.fileno(), [view[done:]], start + done)
            if not count:
                raise Unreadable(f"{file} is torn: it became shorter while it was read")
            done += count


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor of a file that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The header of a file, the offset of each of its tensors, and its total size."""

    head: bytes
    starts: Mapping[str, int]
    size: int


def layout(entries: Iterable[Entry], metadata: Mapping[str, str] = _FORMAT) -> Layout:
    """Place tensors like safetensors' own writer: the largest elements first, so that all are aligned."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for entry in sorted(entries, key=lambda entry: (-BYTES[entry.dtype], entry.name)):
        starts[entry.name] = end
        offsets = [end, end + entry.bytes]
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    head = struct.pack("<Q", len(text)) + text
    return Layout(head, {name: len(head) + start for name, start in starts.items()}, len(head) + end)


class ShardFile:
    """A safetensors file that is being written; `write` may be called by several threads. Raises OSError."""

    def __init__(self, path: Path, entries: Iterable[Entry]) -> None:
        self._layout = layout(entries)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def __enter__(self) -> Self:
        self._put(self._layout.head, 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of the tensor `name`, from its byte `offset` on."""
        self._put(data, self._layout.starts[name] + offset)

    def _put(self, data: bytes | memoryview, start: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], start + done)

"""safetensors files that are written in any order, by several threads: where each tensor goes is settled before the first byte."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Size of one element, by safetensors' names of dtypes."""
INDEX = "model.safetensors.index.json"
_ALIGNED = 8
_FORMAT = {"format": "pt"}


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
    """The first bytes of a file, where each of its tensors begins, and its whole size."""

    head: bytes
    starts: Mapping[str, int]
    size: int


def layout(entries: Iterable[Entry], metadata: Mapping[str, str] = _FORMAT) -> Layout:
    """Place tensors as safetensors' own writer does: the largest elements first, so that all are aligned, then by name."""
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

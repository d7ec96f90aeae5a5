"""Contents of checkpoint files, read without torch or the tensors, to detect damage and changes."""

from __future__ import annotations

import errno
import hashlib
import json
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

_DAMAGED = "truncated or damaged"
_NO_ARCHIVE = (
    zipfile.BadZipFile, ValueError, struct.error, zlib.error, EOFError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""Exceptions of zipfile for bytes that are not a complete archive."""
_SAMPLE = 4096
INDEX = "model.safetensors.index.json"
"""File of an HF folder that maps each tensor to its file, if there are several files."""


class Unreadable(Exception):
    """Weights cannot be read; the message says why and names the file."""


def model_files(hf: Path) -> list[Path]:
    """The safetensors files of an HF folder: those that its index names, or else the single one. Raises Unreadable."""
    index = hf / INDEX
    if not index.is_file():
        return [hf / "model.safetensors"]
    try:
        return [hf / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError):
        raise Unreadable(f"{index} is damaged") from None


def is_missing(file: Path) -> bool:
    """Whether a file is missing or empty; a broken or circular link counts as missing."""
    return not file.is_file() or not file.stat().st_size


def torn(file: Path) -> str | None:
    """What is wrong with a file of torch.save: `missing`, `empty`, `truncated or damaged`; None if it is complete.

    Such a file is a zip archive with its table of contents at the end, so truncation is found in milliseconds. Zeros in
    the middle of a file of the right length are not found.
    """
    try:
        if not file.stat().st_size:
            return "empty"
        with zipfile.ZipFile(file) as archive:
            return None if _is_whole(archive) else _DAMAGED
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        # a damaged table of contents makes zipfile seek to before the file's start
        return _DAMAGED if error.errno == errno.EINVAL else f"unreadable ({error.strerror or error})"
    except _NO_ARCHIVE:
        return _DAMAGED


def _is_whole(archive: zipfile.ZipFile) -> bool:
    """Whether the archive has a pickle with a valid checksum, and all tensors start at the offsets of its table."""
    pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        return False
    archive.read(pickles[0])
    for entry in archive.infolist():
        archive.open(entry).close()
    return True


def texts(file: Path) -> set[str]:
    """Every string in the pickle of a torch.save file, which include its tensors' names; the pickle is not executed.

    Raises Unreadable.
    """
    if problem := torn(file):
        raise Unreadable(f"{file} is torn: {problem}")
    with zipfile.ZipFile(file) as archive:
        pickled = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        try:
            return {value for _, value, _ in pickletools.genops(archive.read(pickled)) if isinstance(value, str)}
        except ValueError:
            raise Unreadable(f"{file} is torn: {_DAMAGED}") from None


def checksums(shard: Path) -> bytes:
    """Name, size and CRC-32 of all members of a torch.save file, independent of the file's name.

    Raises Unreadable if it is damaged.
    """
    if problem := torn(shard):
        raise Unreadable(f"{shard} is torn: {problem}")
    with zipfile.ZipFile(shard) as archive:
        entries = [(entry.filename.partition("/")[2], entry.file_size, entry.CRC) for entry in archive.infolist()]
    return repr(sorted(entries)).encode()


def table(file: Path) -> tuple[dict[str, Any], int]:
    """The table of a safetensors file, and the offset of its tensors' bytes. Raises Unreadable if it is damaged.

    The format is the length of the table in 8 bytes, the table as JSON, and the tensors' bytes without gaps.
    """
    size = 0
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(length) if 8 + length <= size else b"")
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise Unreadable(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError):
        end = None
    if end != size:
        raise Unreadable(f"{file} is torn: {_DAMAGED if size else 'empty'}")
    return entries, 8 + length


def shapes(hf: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in an HF folder's safetensors files. Raises Unreadable for a missing or damaged file."""
    tables = (table(file)[0] for file in model_files(hf))
    return {name: tuple(entry["shape"]) for found in tables for name, entry in found.items()}


def metadata(file: Path) -> dict[str, str]:
    """The metadata of a complete safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        found: dict[str, str] = json.loads(stream.read(length)).get("__metadata__", {})
    return found


def samples(file: Path) -> bytes:
    """Digest of a safetensors file's table and of both ends of each tensor. Raises Unreadable if it is damaged."""
    entries, start = table(file)
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode())
    with file.open("rb") as stream:
        for name in sorted(entries):
            first, last = entries[name]["data_offsets"]
            for offset in (first, max(first, last - _SAMPLE)):
                stream.seek(start + offset)
                digest.update(stream.read(min(_SAMPLE, last - offset)))
    return digest.digest()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises Unreadable for anything else."""
    try:
        data = json.loads(read_bytes(file))
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise Unreadable(f"{file} is damaged")
    return data


def read_bytes(file: Path) -> bytes:
    """The bytes of a small file. Raises Unreadable if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise Unreadable(f"{file} cannot be read: {error.strerror or error}") from None

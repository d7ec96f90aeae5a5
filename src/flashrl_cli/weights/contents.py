"""What is in the files of a checkpoint, read without torch or the tensors: complete or torn, changed or not."""

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
"""What zipfile raises for bytes that are no whole archive."""
_SAMPLE = 4096
INDEX = "model.safetensors.index.json"
"""File of an HF folder that names the file of each tensor, where there are several."""


class Unreadable(Exception):
    """Weights that cannot be read, and why, with the file named."""


def model_files(hf: Path) -> list[Path]:
    """The safetensors files of an HF folder: those that its index names, else the one there is. Raises Unreadable."""
    index = hf / INDEX
    if not index.is_file():
        return [hf / "model.safetensors"]
    try:
        return [hf / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError):
        raise Unreadable(f"{index} is damaged") from None


def is_missing(file: Path) -> bool:
    """Whether a file is not there or empty; a link that leads nowhere, or in a circle, is not there."""
    return not file.is_file() or not file.stat().st_size


def torn(file: Path) -> str | None:
    """What is wrong with a file that torch.save wrote: `missing`, `empty`, `truncated or damaged`; None if it is whole.

    Such a file is a zip whose list of contents is at its end, so that a cut is found in milliseconds. Zeros in the
    middle of a file of the right length are not found.
    """
    try:
        if not file.stat().st_size:
            return "empty"
        with zipfile.ZipFile(file) as archive:
            return None if _is_whole(archive) else _DAMAGED
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        # a damaged list of contents sends zipfile to places before the file's start
        return _DAMAGED if error.errno == errno.EINVAL else f"unreadable ({error.strerror or error})"
    except _NO_ARCHIVE:
        return _DAMAGED


def _is_whole(archive: zipfile.ZipFile) -> bool:
    """Whether the archive holds a pickle with its checksum, and each tensor starts where the list of contents says."""
    pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        return False
    archive.read(pickles[0])
    for entry in archive.infolist():
        archive.open(entry).close()
    return True


def texts(file: Path) -> set[str]:
    """Every text in the pickle of a file of torch.save's, the names of its tensors among them; it is not run.

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
    """Name, size and CRC-32 of everything in a file of torch.save's, whatever the file is called.

    Raises Unreadable if it is torn.
    """
    if problem := torn(shard):
        raise Unreadable(f"{shard} is torn: {problem}")
    with zipfile.ZipFile(shard) as archive:
        entries = [(entry.filename.partition("/")[2], entry.file_size, entry.CRC) for entry in archive.infolist()]
    return repr(sorted(entries)).encode()


def table(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their bytes start. Raises Unreadable if it is torn.

    The format: the length of the table in 8 bytes, the table as JSON, and the tensors' bytes without gaps.
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
    """Shapes of the tensors in an HF folder's safetensors files. Raises Unreadable for one that lacks or is torn."""
    tables = (table(file)[0] for file in model_files(hf))
    return {name: tuple(entry["shape"]) for found in tables for name, entry in found.items()}


def metadata(file: Path) -> dict[str, str]:
    """What the writer of a whole safetensors file says beside its tensors."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        found: dict[str, str] = json.loads(stream.read(length)).get("__metadata__", {})
    return found


def samples(file: Path) -> bytes:
    """Digest of a safetensors file's table and of both ends of each tensor. Raises Unreadable if it is torn."""
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
    """The object in a JSON file. Raises Unreadable."""
    try:
        data = json.loads(read_bytes(file))
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise Unreadable(f"{file} is damaged")
    return data


def read_bytes(file: Path) -> bytes:
    """What is in a small file. Raises Unreadable."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise Unreadable(f"{file} cannot be read: {error.strerror or error}") from None

"""Whether a file is still the one it was: size and time first, its hash only if these leave a doubt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from flashrl_cli import files


class Stamp(TypedDict):
    """A file as it was when it was read or written."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


def stamp(path: Path, *, name: str | None = None) -> Stamp:
    """Stamp of a file, under its absolute path or under `name`."""
    status = path.stat()
    return Stamp(path=name or str(path), bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=files.sha256(path))


def unchanged(path: Path, was: Any) -> bool:
    """Whether `path` holds what it held at its stamp `was` (as read back from a manifest)."""
    try:
        status = path.stat()
        if status.st_size != was["bytes"]:
            return False
        return bool(status.st_mtime_ns == was["mtime_ns"]) or files.sha256(path) == was["sha256"]
    except (OSError, KeyError, TypeError):
        return False

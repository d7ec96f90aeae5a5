"""Atomic writing, locking and hashing of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it replaces `path`, on failure it is removed.

    Works for a file or a folder (a folder replaces only a missing or empty one).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock on `path` against this user's other processes; yields whether another process held it before.

    `path` need not exist. `waiting` is called before this process waits for another. The lock file is in the folder of
    temporary files, because `path` may be on a read-only disk. If no lock can be created, this does not wait at all.
    """
    from filelock import FileLock, Timeout

    name = hashlib.sha256(os.path.realpath(path).encode(errors="surrogateescape")).hexdigest()[:24]
    with contextlib.ExitStack() as stack:
        waited = False
        with contextlib.suppress(OSError):
            folder = Path(tempfile.gettempdir()) / f"flashrl-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
            lock = FileLock(folder / f"{name}.lock")
            try:
                stack.enter_context(lock.acquire(blocking=False))
            except Timeout:
                waited = True
                waiting()
                stack.enter_context(lock.acquire())
        yield waited


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically, creating its folder."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path` atomically as indented JSON."""
    write_text(path, json_text(data, indent=2) + "\n")


def json_text(data: Any, **form: Any) -> str:
    """JSON text that can be encoded as UTF-8.

    Non-ASCII text is escaped if a file name in it holds bytes that are not UTF-8 (PEP 383).
    """
    text = json.dumps(data, ensure_ascii=False, **form)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(data, **form)
    return text


def keep_newest(paths: Sequence[Path], most: int) -> None:
    """Remove the first of `paths` until the rest has `most` bytes or fewer; the last one stays."""
    sizes = [path.stat().st_size for path in paths]
    excess = sum(sizes) - most
    for path, size in list(zip(paths, sizes, strict=True))[:-1]:
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a text file, with undecodable bytes replaced; an empty list if there is no file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Raw rows out of local files, each with the place it stands at: `file:line`, or `file:row N` in Parquet."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashrl_cli.data.extras import require
from flashrl_cli.data.rows import BadRows, Raw
from flashrl_cli.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet")
BATCH = 4096
GAP = re.compile(r"[\s,]*")
Located = tuple[str, Raw]


def read(path: Path, bad: BadRows) -> Iterator[Located]:
    """Yield the rows of one file; what is no row at all goes to `bad`. InputError if the file cannot be read."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif _is_array(path):
        yield from _array(path, bad)
    else:
        yield from _lines(path, bad)


def count(path: Path) -> int | None:
    """Number of rows, for the progress bar; None where only reading would tell."""
    if path.suffix == ".parquet":
        with readable(path):
            return int(require("pyarrow.parquet").read_metadata(path).num_rows)
    if _is_array(path):
        return None
    with readable(path), path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a broken or forbidden file raises into InputError (Arrow's own errors are ValueErrors or OSErrors)."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _lines(path: Path, bad: BadRows) -> Iterator[Located]:
    with readable(path):
        stream = path.open("rb")
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                bad.add(f"{path}:{number}", f"not JSON: {error}")
                continue
            yield from _object(value, f"{path}:{number}", bad)


def _is_array(path: Path) -> bool:
    """Whether a JSON file is one array; many `.json` files hold one object a line instead."""
    with readable(path), path.open("rb") as stream:
        return stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array(path: Path, bad: BadRows) -> Iterator[Located]:
    """Rows of `[{…}, {…}]`, decoded one by one so that each knows its line."""
    with readable(path):
        content = path.read_text(encoding="utf-8-sig")
    decoder, line, seen = json.JSONDecoder(), 1, 0
    position = _after_gap(content, content.index("[") + 1)
    while not content.startswith("]", position):
        line, seen = line + content.count("\n", seen, position), position
        try:
            value, position = decoder.raw_decode(content, position)
        except (ValueError, RecursionError) as error:
            bad.add(f"{path}:{line}", f"not JSON: {error}")
            return
        yield from _object(value, f"{path}:{line}", bad)
        position = _after_gap(content, position)


def _after_gap(content: str, position: int) -> int:
    found = GAP.match(content, position)
    return found.end() if found else position


def _object(value: Any, where: str, bad: BadRows) -> Iterator[Located]:
    if isinstance(value, dict):
        yield where, value
    else:
        bad.add(where, f"not a JSON object but {type(value).__name__}")


def _parquet(path: Path) -> Iterator[Located]:
    parquet = require("pyarrow.parquet")
    with readable(path):
        batches = parquet.ParquetFile(path).iter_batches(batch_size=BATCH)
    number = 0
    while (batch := _next(batches, path)) is not None:
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:row {number}", row


def _next(batches: Iterator[Any], path: Path) -> Any:
    with readable(path):
        return next(batches, None)

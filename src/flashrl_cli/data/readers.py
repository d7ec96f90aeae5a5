"""Read raw rows from local files, each with its position: a line, or a row of Parquet, counted from 1.

CSV files have text alone, and their first line names the columns.

Libraries of the `data` extra are imported when they are first needed; an error names the fix if they are missing.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flashrl_cli.data.rows import MEDIA, BadRows, Fault, Located, Needs, kind, printable, shown
from flashrl_cli.errors import EnvironmentNotReady, InputError, Location
from flashrl_cli.machine import software
from flashrl_cli.text import counted

SUFFIXES = (".jsonl", ".json", ".parquet")
"""Formats of files in verl's schema."""
TABLES = (".csv", ".tsv")
SOURCES = (*SUFFIXES, *TABLES)
"""Formats of files of raw rows."""
LONGEST_CELL = 10_000_000
"""Characters of a cell of a CSV file at most."""
BATCH = 4096
_BATCH_WITH_MEDIA = 64
"""Batch size for files with media, because one row may hold megabytes of images."""
GAP = re.compile(r"[\s,]*")


def require(module: str) -> Any:
    """Import a module; EnvironmentNotReady if its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise EnvironmentNotReady(f"{package} is not installed", hint=software.install_extra("data")) from error


def read(path: Path, bad: BadRows, columns: Sequence[str] | None = None) -> Iterator[Located]:
    """Yield the rows of one file; entries that are not rows go to `bad`. InputError if the file cannot be read.

    Of Parquet files only `columns` are read, if any are named; of images, videos and audios only whether a row has
    some.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path, columns)
    elif path.suffix in TABLES:
        yield from _table(path, bad)
    elif _is_array(path):
        yield from _array(path, bad)
    else:
        yield from _lines(path, bad)


def read_rows(path: Path, needs: Needs, bad: BadRows) -> Iterator[Located]:
    """Yield the required columns of the rows of a file in verl's schema.

    InputError if the file cannot be read or lacks a column.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"cannot read {path}", hint=f"known formats are {', '.join(SUFFIXES)}")
    if path.suffix != ".parquet":
        return read(path, bad)
    with readable(path):
        there = require("pyarrow.parquet").read_schema(path).names
    if missing := [name for name in needs.columns if name not in there]:
        raise InputError(
            f"{path} lacks the column {', '.join(missing)}",
            hint=f"it has: {', '.join(map(printable, there)) or 'none'}; flashrl prepare writes verl's schema",
        )
    media = MEDIA if needs.text_only else ()
    return read(path, bad, ("data_source", needs.prompt, "reward_model", "extra_info", *media))


def count(path: Path) -> int | None:
    """Number of rows; None for a CSV file and for one JSON array, which would have to be parsed to count them."""
    if path.suffix == ".parquet":
        with readable(path):
            return int(require("pyarrow.parquet").read_metadata(path).num_rows)
    if path.suffix in TABLES or _is_array(path):
        return None
    with readable(path), path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Convert errors of a broken or forbidden file to InputError (Arrow's own errors are ValueErrors or OSErrors)."""
    try:
        yield
    except (OSError, ValueError, OverflowError, NotImplementedError) as error:
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
                bad.add(Location(str(path), number), _not_json(error))
                continue
            yield from _object(value, Location(str(path), number), bad)


def _table(path: Path, bad: BadRows) -> Iterator[Located]:
    """Yield the rows of a CSV file, each with the line where it begins; an empty cell is empty text."""
    csv.field_size_limit(LONGEST_CELL)
    with readable(path), path.open(encoding="utf-8-sig", newline="") as stream:
        header = stream.readline()
        stream.seek(0)
        reader = csv.reader(stream, delimiter=_delimiter(path, header), strict=True)
        columns = next(_records(path, reader), (1, []))[1]
        if faults := _header_faults(columns):
            raise InputError(f"{path}:1: {faults}", hint="the first line of a CSV file names its columns")
        for line, cells in _records(path, reader):
            place = Location(str(path), line)
            if len(cells) == len(columns):
                yield place, dict(zip(columns, cells, strict=True))
            elif cells:
                what = f"{counted(len(cells), 'cell')}, and {counted(len(columns), 'column')} in line 1"
                bad.add(place, Fault(what, "quote text that holds the separator or a line break"))


def _delimiter(path: Path, header: str) -> str:
    """A tab for `.tsv`, else the most frequent of comma, semicolon and tab in the first line."""
    return "\t" if path.suffix == ".tsv" else max(",;\t", key=header.count)


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a CSV file, each with the line where it begins."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{path}:{line}: not CSV: {error}", hint='a quote within quoted text is written ""'
            ) from None
        if cells is None:
            return
        yield line, cells


def _header_faults(columns: Sequence[str]) -> str | None:
    if not any(name.strip() for name in columns):
        return "no names of columns"
    if not all(name.strip() for name in columns):
        return "a column has no name"
    twice = [name for name in columns if columns.count(name) > 1]
    return f"two columns are named {printable(twice[0])!r}" if twice else None


def _is_array(path: Path) -> bool:
    """Whether a JSON file is one array; many `.json` files instead hold one object per line."""
    with readable(path), path.open("rb") as stream:
        return stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array(path: Path, bad: BadRows) -> Iterator[Located]:
    """Yield the rows of `[{…}, {…}]`, decoded one by one so that the line of each is known."""
    with readable(path):
        content = path.read_text(encoding="utf-8-sig")
    decoder, line, seen = json.JSONDecoder(), 1, 0
    position = _after_gap(content, content.index("[") + 1)
    while not content.startswith("]", position):
        line, seen = line + content.count("\n", seen, position), position
        try:
            value, position = decoder.raw_decode(content, position)
        except (ValueError, RecursionError) as error:
            bad.add(Location(str(path), line), _not_json(error))
            return
        yield from _object(value, Location(str(path), line), bad)
        position = _after_gap(content, position)
    if rest := content[position + 1 :].strip():
        line += content.count("\n", seen, len(content) - len(content[position + 1 :].lstrip()))
        bad.add(Location(str(path), line), Fault("text after the end of the array", value=shown(rest)))


def _after_gap(content: str, position: int) -> int:
    found = GAP.match(content, position)
    return found.end() if found else position


def _not_json(error: Exception) -> Fault:
    if isinstance(error, RecursionError):
        return Fault("nested too deep to be read")
    return Fault("not JSON", value=str(error))


def _object(value: Any, place: Location, bad: BadRows) -> Iterator[Located]:
    if isinstance(value, dict):
        yield place, value
    else:
        bad.add(place, Fault(f"not a JSON object but {kind(value)}"))


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[Located]:
    parquet = require("pyarrow.parquet")
    with readable(path):
        file = parquet.ParquetFile(path)
        there = [name for name in file.schema_arrow.names if columns is None or name in columns]
        size = _BATCH_WITH_MEDIA if columns and set(there) & set(MEDIA) else BATCH
        batches = file.iter_batches(batch_size=size, columns=there)
    number = 0
    while (rows := _next(batches, path, shorten=columns is not None)) is not None:
        for row in rows:
            number += 1
            yield Location(str(path), number, unit="row"), row


def _next(batches: Iterator[Any], path: Path, *, shorten: bool) -> list[dict[str, Any]] | None:
    """Rows of the next batch; with `shorten`, media are replaced by whether there are any."""
    with readable(path):
        batch = next(batches, None)
        if batch is None:
            return None
        media = [name for name in batch.schema.names if name in MEDIA] if shorten else []
        filled = {name: _filled(batch.column(name)) for name in media}
        rows: list[dict[str, Any]] = batch.select([n for n in batch.schema.names if n not in media]).to_pylist()
    for name, marks in filled.items():
        for row, mark in zip(rows, marks, strict=True):
            row[name] = mark
    return rows


def _filled(column: Any) -> list[bool]:
    """Whether each value is present and, if it is a list, not empty."""
    pa, compute = require("pyarrow"), require("pyarrow.compute")
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = compute.list_value_length(column)
        return [bool(length) for length in column.to_pylist()]
    return list(column.is_valid().to_pylist())

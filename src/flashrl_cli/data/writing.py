"""Write rows to Parquet files with a manifest: the complete data set is replaced, the manifest last, or nothing is.

`stamp` and `unchanged` check whether a file is still the one in a manifest: first by size and time, and by its hash
only if these are inconclusive.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from flashrl_cli import __version__, files
from flashrl_cli.data.readers import count, require
from flashrl_cli.data.rows import Fault, kind_of, printable, shown
from flashrl_cli.errors import EnvironmentNotReady, InputError, Location
from flashrl_cli.paths import DatasetPaths

if TYPE_CHECKING:
    from flashrl_cli.data.rows import Row

SCHEMA_VERSION = 1
DEEPEST = 16
"""Largest nesting depth of lists and objects: Arrow writes deeper ones, but then cannot open the file."""
_INT64 = range(-(2**63), 2**63)
_EXACT = 2**53
"""From this number on, a double cannot represent every integer."""
_SURROGATE = "a lone surrogate (\\ud800) cannot be written"


class Stamp(TypedDict):
    """Properties of a file at the time when it was read or written."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


def stamp(path: Path, *, name: str | None = None) -> Stamp:
    """Stamp of a file, with its absolute path or with `name`."""
    status = path.stat()
    return Stamp(path=name or str(path), bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=files.sha256(path))


def unchanged(path: Path, was: Any) -> bool:
    """Whether `path` has the content that it had at its stamp `was` (as read from a manifest)."""
    try:
        status = path.stat()
        if status.st_size != was["bytes"]:
            return False
        return bool(status.st_mtime_ns == was["mtime_ns"]) or files.sha256(path) == was["sha256"]
    except (OSError, KeyError, TypeError):
        return False


Manifest = dict[str, Any]


@dataclass(slots=True)
class Types:
    """The type of each place in a row, of which Parquet permits only one; null is compatible with any."""

    _seen: dict[str, tuple[type, Location]] = field(default_factory=dict)
    _large: set[str] = field(default_factory=set)

    def faults(self, place: Location, row: Mapping[str, Any]) -> Iterator[Fault]:
        """Yield what Parquet cannot store of a row together with the earlier rows."""
        for name, value in row.items():
            yield from self._faults(place, name, value, depth=0)

    def _faults(self, place: Location, path: str, value: Any, depth: int) -> Iterator[Fault]:
        if value is None:
            return
        if depth > DEEPEST:
            yield Fault(f"{path.partition('.')[0].partition('[')[0]} is nested more than {DEEPEST} deep", "flatten it")
            return
        yield from self._own_faults(place, path, value)
        if isinstance(value, dict):
            for key, one in value.items():
                if isinstance(key, str) and _is_unicode(key):
                    yield from self._faults(place, f"{path}.{printable(key)}", one, depth + 1)
                else:
                    yield Fault(f"a key of {path} is no Unicode text", _SURROGATE, shown(key))
        elif isinstance(value, list):
            for one in value:
                yield from self._faults(place, f"{path}[]", one, depth + 1)

    def _own_faults(self, place: Location, path: str, value: Any) -> Iterator[Fault]:
        """Yield faults of a value itself, without those of nested values."""
        if isinstance(value, str) and not _is_unicode(value):
            yield Fault(f"{path} is no Unicode text", _SURROGATE, shown(value))
        if isinstance(value, tuple):
            yield Fault(f"{path} is a map", "an object with the same keys in every row")
            return
        if type(value) is int and value not in _INT64:
            yield Fault(f"{path} is a whole number of more than 64 bits", "write it as text", shown(value))
        known, where = self._seen.setdefault(path, (type(value), place))
        if {known, type(value)} == {int, float}:
            self._seen[path] = (float, where)
        elif known is not type(value):
            what = f"{path} is {kind_of(type(value))}, and {kind_of(known)} in {where}"
            yield Fault(what, "one type in all rows; text can hold anything")
        if type(value) is int and abs(value) > _EXACT:
            self._large.add(path)
        if path in self._large and self._seen[path][0] is float:
            yield Fault(f"{path} mixes fractions with whole numbers beyond 2^53", "write them as text")


def _is_unicode(text: str) -> bool:
    """Whether the text contains no lone surrogate."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_dataset(
    paths: DatasetPaths, splits: Mapping[str, Sequence[Row]], about: Mapping[str, Any], counts: Mapping[str, Any]
) -> Manifest:
    """Write every split and the manifest; returns the manifest.

    `about` is added to the manifest unchanged (source, options), `counts[split]` to the split's entry with its rows and
    hash. EnvironmentNotReady if the folder cannot be written.
    """
    try:
        with _leaving_no_folder(paths.root), contextlib.ExitStack() as stack:
            # entered first, so that it is the last to be moved into place
            manifest_file = stack.enter_context(files.replacing(paths.manifest))
            written = {}
            for split, rows in splits.items():
                target = paths.split(split)
                temporary = stack.enter_context(files.replacing(target))
                _write_parquet(temporary, rows)
                written[split] = {"rows": len(rows), **counts[split], **stamp(temporary, name=target.name)}
            head = {"schema_version": SCHEMA_VERSION, "dataset": paths.name, "flashrl": __version__}
            manifest = {**head, **about, "splits": written}
            files.write_json(manifest_file, manifest)
    except OSError as error:
        raise EnvironmentNotReady(f"cannot write {paths.root}: {error}", hint="--out names another folder") from error
    return manifest


@contextlib.contextmanager
def _leaving_no_folder(folder: Path) -> Iterator[None]:
    """Remove `folder` and its parents, as far as they were created meanwhile, if writing to it fails."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it was not created, or it holds other files
            for one in missing:
                one.rmdir()
        raise


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    try:
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, path)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, RecursionError) as error:
        raise InputError(f"the rows do not share one schema: {error}", hint="look at their extra_info") from error


def read_manifest(paths: DatasetPaths) -> Manifest | None:
    """The manifest of a prepared data set; None if there is none, or it has another version."""
    try:
        manifest = json.loads(paths.manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(manifest, dict) and manifest.get("schema_version") == SCHEMA_VERSION
    return manifest if known else None


def outputs_unchanged(paths: DatasetPaths, manifest: Manifest) -> bool:
    """Whether every file that the manifest lists is unchanged."""
    return all(unchanged(paths.split(split), entry) for split, entry in manifest["splits"].items())


def described(path: Path) -> Mapping[str, Any]:
    """What the manifest beside a data file says of it; empty if there is none, or the file changed since."""
    manifest = read_manifest(DatasetPaths(path.parent.name, path.parent)) or {}
    entry = manifest.get("splits", {}).get(path.stem)
    return entry if isinstance(entry, dict) and unchanged(path, entry) else {}


def rows_of(path: Path) -> int | None:
    """Number of rows of a data file, by its manifest or else by the file itself; None if neither tells."""
    with contextlib.suppress(EnvironmentNotReady, InputError):
        rows = described(path).get("rows")
        return rows if isinstance(rows, int) else count(path)
    return None


def remove_stale(paths: DatasetPaths, earlier: Manifest, manifest: Manifest) -> list[Path]:
    """Remove and return the splits of the `earlier` manifest that the new one lacks, which belong to other data."""
    gone = [paths.split(split) for split in earlier.get("splits", {}) if split not in manifest["splits"]]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone

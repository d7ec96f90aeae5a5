"""Rows to Parquet files and their manifest: all of a data set is replaced, the manifest last, or nothing is.

Also the question that a second run asks: is what lies there what would be written now?
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import __version__, files
from flashrl_cli.data.extras import require
from flashrl_cli.data.stamps import stamp, unchanged
from flashrl_cli.errors import EnvironmentNotReady, InputError

if TYPE_CHECKING:
    from flashrl_cli.data.rows import Row
    from flashrl_cli.paths import DatasetPaths

SCHEMA_VERSION = 1
Manifest = dict[str, Any]


def write_dataset(
    paths: DatasetPaths, splits: Mapping[str, Sequence[Row]], about: Mapping[str, Any], counts: Mapping[str, Any]
) -> Manifest:
    """Write every split and the manifest; returns the manifest.

    `about` goes into the manifest as it is (source, options), `counts[split]` into the split's entry beside its rows
    and hash. EnvironmentNotReady if the folder cannot be written.
    """
    try:
        with contextlib.ExitStack() as stack:
            # entered first, so it is the last to be moved into place
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


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    try:
        table = pyarrow.Table.from_pylist(rows)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise InputError(f"the rows do not share one schema: {error}", hint="look at their extra_info") from error
    parquet.write_table(table, path)


def read_manifest(paths: DatasetPaths) -> Manifest | None:
    """The manifest of a prepared data set; None if there is none, or it is not one of this version's."""
    try:
        manifest = json.loads(paths.manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(manifest, dict) and manifest.get("schema_version") == SCHEMA_VERSION
    return manifest if known else None


def outputs_unchanged(paths: DatasetPaths, manifest: Manifest) -> bool:
    """Whether every file that the manifest lists still is what was written."""
    return all(unchanged(paths.split(split), entry) for split, entry in manifest["splits"].items())


def remove_stale(paths: DatasetPaths, earlier: Manifest, manifest: Manifest) -> list[Path]:
    """Remove and return the splits of the `earlier` manifest that the new one lacks: they do not belong together."""
    gone = [paths.split(split) for split in earlier.get("splits", {}) if split not in manifest["splits"]]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone

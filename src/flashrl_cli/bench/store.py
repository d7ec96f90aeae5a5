"""What was measured already: one file a point, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files

if TYPE_CHECKING:
    from flashrl_cli.bench.points import Point

SCHEMA_VERSION = 1


class Store:
    """Files of finished points in one folder; with `fresh` those that are there already count for nothing."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self._folder, self._fresh = folder, fresh
        self._made: set[str] = set()

    def load(self, point: Point) -> dict[str, Any] | None:
        """A point's result; None if there is none, or none that can be read."""
        if self._fresh and point.key not in self._made:
            return None
        try:
            data = json.loads(self._file(point).read_text(encoding="utf-8"))
            result: dict[str, Any] = data["result"]
            return result if data["schema_version"] == SCHEMA_VERSION else None
        except (OSError, KeyError, TypeError, ValueError):
            return None

    def save(self, point: Point, result: dict[str, Any]) -> None:
        """Keep a point's result."""
        about = {"variant": point.variant, "kind": point.kind, "asked": point.asked}
        files.write_json(self._file(point), {"schema_version": SCHEMA_VERSION, **about, "result": result})
        self._made.add(point.key)

    def samples(self, point: Point) -> Path:
        """The file of what was sampled for a point."""
        return self._folder / f"{point.key}.npz"

    def _file(self, point: Point) -> Path:
        return self._folder / f"{point.key}.json"

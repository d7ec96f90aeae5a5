"""Plans on disk: what an attempt was really started with, found by the names that people have for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashrl_cli import paths
from flashrl_cli.errors import InputError

PLAN_VERSION = 1
"""`schema_version` of the plans that are written and read."""


def run_names() -> list[str]:
    """Names of the runs on disk, sorted; reads folder names only."""
    root = paths.runs_root()
    return sorted(path.name for path in root.glob("[!.]*") if path.is_dir())


def find_plan(reference: str) -> Path | None:
    """A plan's file: itself, an attempt's, or that of a run's newest attempt; paths may start in the runs folder."""
    for place in (paths.absolute(reference), paths.absolute(paths.runs_root() / reference)):
        if place.is_file() and place.suffix == ".json":
            return place
        run = paths.RunPaths(place.name, place, place)
        attempts = [paths.AttemptPaths(place), *(run.attempt(number) for number in reversed(run.attempts()))]
        found = next((attempt.plan for attempt in attempts if attempt.plan.is_file()), None)
        if found:
            return found
    return None


def read_plan(path: Path) -> dict[str, Any]:
    """The plan's document (`plan.plan_document`). Raises InputError when the file is none, or another version's."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", hint="give a run's folder or its plan.json") from None
    if not isinstance(document, dict) or not {"schema_version", "overrides", "env", "files"} <= document.keys():
        raise InputError(f"{path} is not a launch plan", hint="give a run's folder or its plan.json")
    if document["schema_version"] != PLAN_VERSION:
        version = document["schema_version"]
        raise InputError(f"{path}: plan of schema version {version}, this flashrl reads {PLAN_VERSION}")
    return document

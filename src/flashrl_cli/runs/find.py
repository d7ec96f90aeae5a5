"""Runs by name."""

from __future__ import annotations

import difflib

from flashrl_cli import paths
from flashrl_cli.errors import NothingMatched
from flashrl_cli.paths import RunPaths


def find(name: str) -> RunPaths:
    """The run `name` in the runs folder. Raises NothingMatched, with near names, if there is none."""
    root = paths.runs_root() / name
    if root.name == name and not name.startswith(".") and root.is_dir():  # not the runs folder or one above it
        return RunPaths(root.name, root, root)
    names = sorted(path.name for path in paths.runs_root().glob("[!.]*") if path.is_dir())
    near = difflib.get_close_matches(name, names)
    hint = f"did you mean {' or '.join(near)}?" if near else f"runs there: {', '.join(names[:8]) or 'none'}"
    raise NothingMatched(f"no run {name!r} in {paths.runs_root()}", hint=hint)

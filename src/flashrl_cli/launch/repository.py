"""What the repository that flashrl is called in looked like: for the record of a run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

TIMEOUT_S = 10.0


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and whether tracked files were changed; None outside a repository, or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"), "dirty": bool(changed)}


def _git(folder: Path, *words: str) -> str | None:
    """Output of a git command that only reads; None if it fails."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

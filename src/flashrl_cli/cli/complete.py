"""What the shell completes: names of presets and of runs, from folders alone; no file is read."""

from __future__ import annotations


def preset_names(incomplete: str) -> list[str]:
    """Names of the presets that start so; none for a path, which the shell completes itself."""
    from flashrl_cli.config.presets import names

    return [name for name in names() if name.startswith(incomplete)]


def run_names(incomplete: str) -> list[str]:
    """Names of the runs on disk that start so."""
    from flashrl_cli.runs import recorded

    return [name for name in recorded.run_names() if name.startswith(incomplete)]


def preset_and_run_names(incomplete: str) -> list[str]:
    """Names of presets, then of runs."""
    return [*preset_names(incomplete), *run_names(incomplete)]


def executors(incomplete: str) -> list[str]:
    """Where a run can be executed."""
    return [name for name in ("local", "ray") if name.startswith(incomplete)]

"""Specs of presets for tests, with the options that they would get on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from flashrl_cli.config.resolve import Options, Resolved, read_spec


def load_spec(preset: str, *, rollout: str | None = None, tis: str | None = None, sets: Sequence[str] = ()) -> Resolved:
    """A preset under options. Raises InputError with everything that is wrong with it."""
    return read_spec(preset, Options(rollout=rollout, tis=tis, sets=sets)).checked()

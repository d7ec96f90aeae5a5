"""What to say to a person who uses a key of verl's as if it were flashrl's: its name here, or its place under `verl:`."""

from __future__ import annotations

import functools
from difflib import get_close_matches

from flashrl_cli.config.merge import leaves
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.verl import compose
from flashrl_cli.verl.rules import OWNED
from flashrl_cli.verl.versions import dead_key


def translation(key: str) -> str | None:
    """Hint to a key that is verl's, or nearly so; None for one that means nothing to verl either.

    Composes verl's tree (once a process) for keys that flashrl has no field for; without verl those are unknown.
    """
    bare = key.lstrip("+~").removeprefix("verl.").lstrip("+~")
    exact = _exact(bare)
    if exact is None and bare != key:
        return f"--set verl.+{bare}=… adds a key that verl's own tree lacks"
    if exact is None and bare.partition(".")[0] not in RunSpec.model_fields:
        near = get_close_matches(bare, sorted({*OWNED, *_living()}), n=1, cutoff=0.8)
        return f"did you mean verl's {near[0]}? {_exact(near[0])}" if near else None
    return exact


def _exact(key: str) -> str | None:
    dead = dead_key(key)
    if dead:
        return f"verl does not act on it ({dead.why}): use {dead.instead}"
    if key in OWNED:
        return f"flashrl's way to set it: {OWNED[key]}"
    return f"keys of verl's own go under verl: --set verl.{key}=…" if key in _living() else None


@functools.cache
def _living() -> frozenset[str]:
    try:
        return frozenset(key for key, _ in leaves(compose.compose([])))
    except EnvironmentNotReady:
        return frozenset()

"""The last word before a launch: are these overrides what verl will act on?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashrl_cli.errors import InputError
from flashrl_cli.verl import compose, rules
from flashrl_cli.verl.versions import dead_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.verl.overrides import Override


def check_overrides(resolved: Resolved, overrides: Sequence[Override]) -> None:
    """Raise InputError with every problem of the verbatim keys and of verl's tree; EnvironmentNotReady without verl."""
    # A key that the rules refuse by its name is not reported again for being unknown.
    judged = [o for o in overrides if not dead_key(o.key) and not rules.is_forced(o.key)]
    found = [*rules.problems(resolved, overrides), *compose.problems(judged)]
    if found:
        count = f"{len(found)} problem{'s' if len(found) != 1 else ''}"
        raise InputError(f"preset {resolved.spec.name}: {count} with verl's keys", problems=found)

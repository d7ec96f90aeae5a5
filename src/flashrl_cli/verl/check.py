"""The last word before a launch: are these overrides what verl will act on?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.verl import compose, demands, fields, rules
from flashrl_cli.verl.versions import dead_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.verl.demands.settings import Shape
    from flashrl_cli.verl.overrides import Override


def check_overrides(resolved: Resolved, overrides: Sequence[Override], shape: Shape | None = None) -> compose.Tree:
    """verl's configuration of a run, in which nothing is wrong. `shape` is the policy's, where it is known.

    Raises InputError with every problem of the spec's rules, of the keys and of what verl would do with them;
    EnvironmentNotReady without verl.
    """
    # A key that the rules refuse by its name is not reported again for being unknown.
    judged = [o for o in overrides if not dead_key(o.key) and not rules.is_forced(o.key)]
    try:
        tree, unknown = compose.attempt(judged)
    except EnvironmentNotReady:
        if resolved.broken:
            raise resolved.refusal(resolved.broken) from None
        raise
    found = [*resolved.broken, *rules.problems(resolved, overrides), *unknown]
    if tree:
        found += fields.problems(judged, tree)
    if tree and not resolved.broken:  # what verl would make of values that do not go together only follows from that
        places = {problem.where for problem in found}
        later = demands.problems(resolved, judged, tree, shape)
        found += [problem for problem in later if problem.where not in places]
    if found or tree is None:
        raise resolved.refusal(found)
    return tree

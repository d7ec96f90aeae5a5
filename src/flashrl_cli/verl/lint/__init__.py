"""Preflight rules on verl's composed tree: what verl 0.9.1, vLLM or Ray would refuse late or silently do otherwise.

verl checks a part of its configuration when its driver starts, another part in workers, minutes later, and some keys
not at all. A rule is a generator over `Settings`; its docstring states the consequence and the source of that
knowledge. A new rule is added to the RULES of its module. Rules report only what is certain to go wrong: a setting that
works is never refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.verl import compose
from flashrl_cli.verl.config import Rule, Settings
from flashrl_cli.verl.dead_keys import dead_key
from flashrl_cli.verl.lint import batches, devices, keys, learning, rollout, sampling
from flashrl_cli.verl.lint.devices import trains_with_fsdp
from flashrl_cli.verl.overrides import MODE

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.errors import Problem
    from flashrl_cli.verl.overrides import Override
    from flashrl_cli.weights.shape import ModelShape

FIRST: tuple[Rule, ...] = (keys.values_have_types, trains_with_fsdp)
"""Rules that the others rely on: if one of them is broken, the others are not evaluated."""
RULES: tuple[Rule, ...] = (*FIRST, *batches.RULES, *devices.RULES, *rollout.RULES, *sampling.RULES, *learning.RULES)


def problems(
    resolved: Resolved, overrides: Sequence[Override], tree: compose.Tree, shape: ModelShape | None = None
) -> list[Problem]:
    """Everything that a run of verl's `tree`, composed of `overrides`, would fail with later.

    `shape` is the policy's; rules that need it are skipped where it is None.
    """
    settings = Settings(resolved, overrides, tree, shape)
    wrong = [problem for rule in FIRST for problem in rule(settings)]
    return wrong or [problem for rule in RULES[len(FIRST) :] for problem in rule(settings)]


def notes(resolved: Resolved, overrides: Sequence[Override], tree: compose.Tree) -> list[str]:
    """Notes on the numbers that a run will report, for a configuration without problems."""
    settings = Settings(resolved, overrides, tree)
    return [*sampling.notes(settings), *learning.notes(settings)]


@dataclass(frozen=True, slots=True)
class Composition:
    """verl's configuration as composed of overrides: None if Hydra refuses them, with the problems of their keys."""

    overrides: tuple[Override, ...]
    tree: compose.Tree | None
    problems: tuple[Problem, ...]

    def updated(self, overrides: Sequence[Override]) -> Composition:
        """The composition of `overrides` with the same keys or more, some with other values; the tree is changed."""
        before = set(map(str, self.overrides))
        judged = _judged(overrides)
        for override in judged:
            if self.tree and str(override) not in before:
                self.tree.put(override)
        return replace(self, overrides=judged)


def _judged(overrides: Sequence[Override]) -> tuple[Override, ...]:
    """Overrides without those that rules refuse by their names, which are not reported a second time as unknown."""
    mode = next((str(o.value) for o in overrides if o.key == MODE), "sync")
    return tuple(o for o in overrides if not dead_key(o.key, mode) and not keys.is_forced(o.key))


def composed(overrides: Sequence[Override]) -> Composition:
    """verl's configuration of a run's overrides. Raises EnvironmentNotReady when verl is not installed."""
    judged = _judged(overrides)
    tree, unknown = compose.attempt(judged)
    return Composition(judged, tree, tuple(unknown))


def check_overrides(
    resolved: Resolved,
    overrides: Sequence[Override],
    shape: ModelShape | None = None,
    before: Composition | None = None,
) -> compose.Tree:
    """verl's configuration of a run, after checking it; `shape` is the policy's, if it is known.

    `before` is the composition of the same overrides with other values, if there is one. Raises InputError with every
    broken rule of the spec, every wrong key and every problem that `problems` finds, and EnvironmentNotReady when verl
    is not installed.
    """
    try:
        composition = before.updated(overrides) if before else composed(overrides)
    except EnvironmentNotReady:
        if resolved.broken:
            raise resolved.refusal(resolved.broken) from None
        raise
    tree, judged = composition.tree, composition.overrides
    found = [*resolved.broken, *keys.verbatim_key_problems(resolved, overrides), *composition.problems]
    if tree:
        found += keys.added_key_problems(judged, tree)
    if tree and not resolved.broken:  # with broken rules of the spec, later problems would only be their consequences
        places = {problem.where for problem in found}
        later = problems(resolved, judged, tree, shape)
        found += [problem for problem in later if problem.where not in places]
    if found or tree is None:
        raise resolved.refusal(found)
    return tree

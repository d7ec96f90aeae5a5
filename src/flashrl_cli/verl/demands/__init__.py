"""What verl 0.9.1, vLLM or Ray would refuse or silently do otherwise LATER, judged on verl's composed tree before a start.

verl checks a part of its configuration at the start of its driver, another in workers, minutes later, and some not at all. A
rule is a generator over `Settings`; its docstring states the consequence and where it is known from. Add one to the RULES of
the module it belongs to. Rules judge what is certain: a setting that works is never refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashrl_cli.verl.demands import batches, devices, learning, rollout, sampling, values
from flashrl_cli.verl.demands.devices import trains_with_fsdp
from flashrl_cli.verl.demands.settings import Rule, Settings, Shape

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.errors import Problem
    from flashrl_cli.verl.compose import Tree
    from flashrl_cli.verl.overrides import Override

FIRST: tuple[Rule, ...] = (values.values_have_types, trains_with_fsdp)
"""Rules that the others rely on: where one is broken, the others are not asked."""
RULES: tuple[Rule, ...] = (*FIRST, *batches.RULES, *devices.RULES, *rollout.RULES, *sampling.RULES, *learning.RULES)


def problems(
    resolved: Resolved, overrides: Sequence[Override], tree: Tree, shape: Shape | None = None
) -> list[Problem]:
    """Everything that `tree` (verl's, composed of `overrides`) would fail with later; `shape` is the model's, if known."""
    settings = Settings(resolved, overrides, tree, shape)
    wrong = [problem for rule in FIRST for problem in rule(settings)]
    return wrong or [problem for rule in RULES[len(FIRST) :] for problem in rule(settings)]


def notes(resolved: Resolved, overrides: Sequence[Override], tree: Tree) -> list[str]:
    """What a person should know of what the run will report, where nothing is wrong."""
    return sampling.notes(Settings(resolved, overrides, tree))

"""Is a run that goes on still the same run? What it trains, against what its last attempt was started with."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from flashrl_cli.config.difference import differences
from flashrl_cli.config.merge import leaves
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.runs.recorded import read_plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flashrl_cli.config.difference import Difference
    from flashrl_cli.launch.plan import LaunchPlan

FREE = (
    "name",
    "description",
    "watch.",
    "trainer.steps",
    "trainer.epochs",
    "trainer.save_every",
    "trainer.validate_every",
    "trainer.validate_before",
    "trainer.logger",
    "resources.gpu_memory_gib",
    "verl.ray_kwargs.",
    "verl.+ray_kwargs.",
)
"""Keys, and starts of keys, that change how long a run is, how it is watched, where it runs and what it writes, but not what it learns."""


def plan_hash(plan: LaunchPlan) -> str:
    """Hex SHA-256 of what a plan trains: its preset's values, less those that may change in mid-run (`FREE`)."""
    text = json.dumps(_trained(plan.spec.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def since_last(plan: LaunchPlan) -> list[Difference]:
    """What `plan` trains differently from the run's newest attempt before it; empty for a first one, or an unreadable plan."""
    before = (plan.paths.attempt(number).plan for number in reversed(plan.paths.attempts()))
    file = next((path for path in before if path.is_file()), None)
    recorded = read_plan(file).get("spec") if file else None
    if recorded is None:
        return []
    origins = {key: str(origin) for key, origin in plan.origins.items()}
    return list(differences(_trained(recorded), _trained(plan.spec.model_dump(mode="json")), origins))


def refuse(plan: LaunchPlan) -> None:
    """Raise InputError, with every difference, if `plan` would go on with a run of another configuration."""
    if changed := since_last(plan):
        problems = [Problem(" → ".join(one.shown()), one.key, None) for one in changed]
        raise InputError(
            f"run {plan.name} was started with another configuration",
            problems=problems,
            hint=f"`--force` goes on with the new one, `--name {plan.name}-2` starts another run",
        )


def _trained(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in leaves(spec) if not key.startswith(FREE)}

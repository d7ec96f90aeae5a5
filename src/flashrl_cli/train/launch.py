"""From a preset and options to the plan of a run's next attempt, checked against verl's own configuration.

Nothing is started here. `plan` defines plans, `resume` decides where a run continues, and `run` executes a plan.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, paths
from flashrl_cli.config.layers import Difference, differences, leaves
from flashrl_cli.config.resolve import read_spec
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.paths import FOLDER_NAME
from flashrl_cli.runs.store import newest_plan
from flashrl_cli.train.plan import LaunchPlan, build_plan, default_name, run_paths
from flashrl_cli.train.preflight import shape, with_attention
from flashrl_cli.train.resume import FROM_NOTHING, Resume, choose
from flashrl_cli.verl.lint import check_overrides
from flashrl_cli.verl.lint.keys import translation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flashrl_cli.config.resolve import Options, Resolved
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.verl.compose import Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What starts a run or a point of a sweep: the preset's values, the plan, and verl's configuration of it."""

    resolved: Resolved
    plan: LaunchPlan
    tree: Tree


def read(preset: str, options: Options) -> Resolved:
    """Read a preset with options; errors refer verl's keys to flashrl's. Raises InputError for an invalid spec."""
    return read_spec(preset, options, translation)


def next_plan(
    resolved: Resolved, name: str | None, *, resume: str, look_only: bool = False, force: bool = False
) -> LaunchPlan:
    """Plan the next attempt of a run; `look_only` also plans for a name that is in use.

    Raises InputError for a name that is in use, for a step that cannot be loaded, and, without `force`, for a run that
    was started with another configuration.
    """
    run_name = default_name(resolved.spec.name, resolved.spec) if name is None else name
    run = run_paths(run_name, resolved.spec, paths.runs_root(), paths.checkpoints_root())
    attempt = next_attempt(run, resume="auto" if look_only else resume)
    plan = _plan(resolved, run_name, attempt, choose(resolved.spec, run, resume))
    if not (look_only or force) and (changed := changes(plan)):
        raise InputError(
            f"run {plan.name} was started with another configuration",
            problems=[Problem(" → ".join(one.shown()), one.key, None) for one in changed],
            hint=f"`--force` goes on with the new one, `--name {plan.name}-2` starts another run",
        )
    return plan


def judge(resolved: Resolved, plan: LaunchPlan) -> Tree:
    """verl's configuration of a plan. Raises InputError with every problem, EnvironmentNotReady without verl."""
    return check_overrides(resolved, plan.overrides, shape(resolved.spec.model.path))


def preview(preset: str, options: Options) -> tuple[Resolved, LaunchPlan]:
    """A preset and the plan of its first run under its default name. Raises InputError if its values break rules."""
    resolved = read(preset, options).checked()
    return resolved, _first_plan(resolved)


def check(preset: str, options: Options) -> list[Problem]:
    """Problems of a preset by the spec, the rules or verl's configuration. Raises EnvironmentNotReady without verl."""
    try:
        resolved = read(preset, options)
        judge(resolved, _first_plan(resolved))
    except InputError as error:
        return list(error.problems) or [Problem(error.message, None, error.hint)]
    return []


def next_attempt(run: RunPaths, *, resume: str) -> int:
    """Number of the attempt to start; a name that was used before is refused unless the run is resumed.

    Otherwise verl would silently continue from the checkpoints of an earlier run of the same name.
    """
    if not re.match(FOLDER_NAME, run.name):
        raise InputError(f"--name {run.name}: not the name of a folder", hint="no slash, and no dot at its start")
    used = run.attempts()
    if resume == "never" and (used or run.checkpoints.exists()):
        raise InputError(
            f"run {run.name} exists already: {run.root if used else run.checkpoints}",
            hint=f"`--resume auto` goes on with it, `--name {run.name}-2` starts another",
        )
    return max(used, default=0) + 1


def _first_plan(resolved: Resolved) -> LaunchPlan:
    return _plan(resolved, default_name(resolved.spec.name, resolved.spec), 1, FROM_NOTHING)


def _plan(resolved: Resolved, name: str, attempt: int, resume: Resume) -> LaunchPlan:
    """A plan for this process, with its Python, its root folders and its log level."""
    return build_plan(
        with_attention(resolved),
        name=name,
        attempt=attempt,
        python=sys.executable,
        runs_root=paths.runs_root(),
        checkpoints_root=paths.checkpoints_root(),
        data_root=paths.data_root(),
        resume=resume,
        logging=os.environ.get(contract.ENV_LOGGING),
    )


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
    "model.attention",
    "resources.gpu_memory_gib",
    "verl.ray_kwargs.",
    "verl.+ray_kwargs.",
)
"""Keys, and prefixes of keys, that may change when a run is resumed: how long it runs, how it is watched, where and by
which kernels it runs, and what it writes, but not what it learns.
"""


def plan_hash(plan: LaunchPlan) -> str:
    """Hex SHA-256 of the values that determine what a plan trains, without those that may change (`FREE`)."""
    text = json.dumps(_trained(plan.spec.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changes(plan: LaunchPlan) -> list[Difference]:
    """What `plan` trains differently from the run's newest attempt before it.

    Empty for a first attempt, or if the earlier plan does not contain the preset's values.
    """
    recorded = newest_plan(plan.paths).get("spec")
    if recorded is None:
        return []
    origins = {key: str(origin) for key, origin in plan.origins.items()}
    return list(differences(_trained(recorded), _trained(plan.spec.model_dump(mode="json")), origins))


def _trained(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in leaves(spec) if not key.startswith(FREE)}

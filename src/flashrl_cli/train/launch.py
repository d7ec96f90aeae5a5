"""From a preset and options to the plan of a run's next attempt, checked against verl's own configuration.

Nothing is started here. `plan` defines plans, `resume` decides where a run continues, and `run` executes a plan.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, paths
from flashrl_cli.config.layers import Difference, Verbatim, differences, leaves
from flashrl_cli.config.resolve import read_spec
from flashrl_cli.errors import EnvironmentNotReady, InputError, Problem
from flashrl_cli.memory import budget
from flashrl_cli.paths import FOLDER_NAME
from flashrl_cli.runs.store import newest_plan
from flashrl_cli.train import preflight, rewards
from flashrl_cli.train.plan import LaunchPlan, build_plan, default_name, reward_document, run_paths
from flashrl_cli.train.resume import FROM_NOTHING, Resume, choose
from flashrl_cli.verl import environment
from flashrl_cli.verl.config import Settings, trainer_settings
from flashrl_cli.verl.lint import check_overrides
from flashrl_cli.verl.lint import composed as compose
from flashrl_cli.verl.lint.keys import translation
from flashrl_cli.verl.overrides import AUTO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flashrl_cli.config.resolve import Options, Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.verl.compose import Tree
    from flashrl_cli.verl.lint import Composition
    from flashrl_cli.verl.overrides import Override

GpuMemory = Callable[["RunSpec"], Sequence[int]]


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
    resolved: Resolved,
    name: str | None,
    *,
    resume: str,
    look_only: bool = False,
    force: bool = False,
    gpu_memory: GpuMemory = preflight.gpu_memory,
) -> LaunchPlan:
    """Plan the next attempt of a run, with a value for each `auto`; `look_only` also plans for a name that is in use.

    `gpu_memory` gives the bytes of each GPU that can be seen of those that a run uses.

    Raises InputError for a name that is in use, for a step that cannot be loaded, and, without `force`, for a run that
    was started with another configuration.
    """
    run_name = default_name(resolved.spec.name, resolved.spec) if name is None else name
    run = run_paths(run_name, resolved.spec, paths.runs_root(), paths.checkpoints_root())
    attempt = next_attempt(run, resume="auto" if look_only else resume)
    plan = _plan(resolved, run_name, attempt, choose(resolved.spec, run, resume), gpu_memory, _recorded(run))
    if not (look_only or force) and (changed := changes(plan)):
        raise InputError(
            f"run {plan.name} was started with another configuration",
            problems=[Problem(" → ".join(one.shown()), one.key, None) for one in changed],
            hint=f"`--force` goes on with the new one, `--name {plan.name}-2` starts another run",
        )
    return plan


def judge(resolved: Resolved, plan: LaunchPlan) -> Tree:
    """verl's configuration of a plan. Raises InputError with every problem, EnvironmentNotReady without verl."""
    return check_overrides(resolved, plan.overrides, preflight.shape(resolved.spec.model.path), plan.composed)


def preview(preset: str, options: Options, gpu_memory: GpuMemory = preflight.gpu_memory) -> tuple[Resolved, LaunchPlan]:
    """A preset and the plan of its first run under its default name. Raises InputError if its values break rules."""
    plan = _first_plan(read(preset, options).checked(), gpu_memory)
    return plan.resolved, plan


def check(preset: str, options: Options) -> list[Problem]:
    """Problems of a preset by the spec, the rules or verl's configuration. Raises EnvironmentNotReady without verl."""
    try:
        plan = _first_plan(read(preset, options))
        judge(plan.resolved, plan)
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


def _first_plan(resolved: Resolved, gpu_memory: GpuMemory = preflight.gpu_memory) -> LaunchPlan:
    name = default_name(resolved.spec.name, resolved.spec)
    return _plan(resolved, name, 1, FROM_NOTHING, gpu_memory, {})


def _plan(
    resolved: Resolved,
    name: str,
    attempt: int,
    resume: Resume,
    gpu_memory: GpuMemory,
    recorded: Mapping[str, Any],
) -> LaunchPlan:
    """A plan for this process, with its Python, its root folders and its log level.

    `recorded` are the values of an attempt before this one, which its `auto` keys keep.
    """

    def build(resolved: Resolved, composed: Composition | None = None) -> LaunchPlan:
        return build_plan(
            resolved,
            name=name,
            attempt=attempt,
            python=sys.executable,
            runs_root=paths.runs_root(),
            checkpoints_root=paths.checkpoints_root(),
            data_root=paths.data_root(),
            resume=resume,
            logging=os.environ.get(contract.ENV_LOGGING),
            cores=None if environment.THREADS in os.environ else len(os.sched_getaffinity(0)),
            reward=source,
            composed=composed,
        )

    resolved = rewards.with_reward(resolved)
    source, wrong = rewards.source_of(resolved)
    resolved = replace(resolved, broken=(*resolved.broken, *wrong))
    resolved = preflight.with_attention(resolved)
    if resolved.value(preflight.ROTATION) == AUTO and preflight.ROTATION in recorded:
        kept = {preflight.ROTATION: budget.Choice(recorded[preflight.ROTATION], KEPT)}
        resolved = budget.decided(resolved, kept)
    else:
        resolved = preflight.with_rotation(resolved)
    undecided = budget.undecided(resolved.spec)
    kept = {key: budget.Choice(recorded[key], KEPT) for key in undecided if recorded.get(key) not in {None, AUTO}}
    resolved = budget.decided(resolved, kept)
    keys = budget.undecided(resolved.spec)
    if not keys:
        return build(resolved)
    choices, composed = _choices(resolved, keys, build(resolved).overrides, gpu_memory)
    return build(budget.decided(resolved, {key: choices[key] for key in keys}), composed)


KEPT = "as in the run's attempt before"


def _recorded(run: RunPaths) -> dict[str, Any]:
    """Values that the run's newest attempt was started with, by their dotted keys; empty if there is none."""
    return dict(leaves(newest_plan(run).get("spec") or {}))


def _choices(
    resolved: Resolved, keys: Sequence[str], overrides: Sequence[Override], gpu_memory: GpuMemory
) -> tuple[dict[str, budget.Choice], Composition | None]:
    """What the `auto` keys of a preset stand for, and verl's configuration where it was composed to know it."""
    spec, composed = resolved.spec, None
    if spec.resources.platform == "cpu":
        return budget.on_cpu(spec, preflight.shape(spec.model.path)), None
    try:
        # a preset that breaks rules is refused for that, whatever else there is
        composed = None if resolved.broken else compose(overrides)
        if composed is None or composed.tree is None:
            raise ValueError("the preset is not accepted")
        settings = trainer_settings(Settings(resolved, composed.overrides, composed.tree))
        policy, critic = preflight.model_shapes(spec)
        if policy is None:
            raise ValueError(f"no config.json of {spec.model.path} is on this machine ({preflight.bring(spec)})")
    except EnvironmentNotReady as error:
        return budget.without_estimate(spec, error.message), None
    except ValueError as error:
        return budget.without_estimate(spec, str(error)), composed
    gpu = budget.Gpu(*preflight.gpu(spec, gpu_memory(spec)))
    return budget.estimated(settings, keys, policy, critic, gpu), composed


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
    "correction.keep_responses",
    "trainer.keep_samples",
    "reward.timeout_s",
    "model.attention",
    "resources.gpu_memory_gib",
    "resources.rollout_nodes",
    "resources.rollout_gpus_per_node",
    "model.packing",
    "model.recompute",
    "algorithm.max_tokens_per_gpu",
    "algorithm.micro_batch_size_per_gpu",
    "critic.max_tokens_per_gpu",
    "critic.micro_batch_size_per_gpu",
    "rollout.log_prob_max_tokens_per_gpu",
    "rollout.log_prob_micro_batch_size_per_gpu",
    "verl.ray_kwargs.",
    "verl.+ray_kwargs.",
)
"""Keys, and prefixes of keys, that may change when a run is resumed: how long it runs, how it is watched, where and by
which kernels it runs, how its passes are cut and what it writes, but not what it learns.
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
    found = list(differences(_trained(recorded), _trained(plan.spec.model_dump(mode="json")), origins))
    before, after = newest_plan(plan.paths).get("reward"), reward_document(plan)
    if before and after and before["sha256"] != after["sha256"]:
        old, new = (Verbatim(f"{one['function']} with SHA-256 {one['sha256'][:8]}…") for one in (before, after))
        found.append(Difference("reward.function", old, new, origins["reward.function"]))
    return found


def _trained(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in leaves(spec) if not key.startswith(FREE)}

"""What a preset would start, and how that differs from what a run was started with; nothing is launched here.

Which attempt of a run comes next, and whether the name may be used.

Is a run that goes on still the same run? What it trains, against what its last attempt was started with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, paths
from flashrl_cli.config import presets
from flashrl_cli.config.layers import Difference, Verbatim, differences, leaves
from flashrl_cli.config.resolve import read_spec
from flashrl_cli.config.spec import FOLDER_NAME
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.runs.store import find_plan, read_plan, run_names
from flashrl_cli.train.plan import LaunchPlan, build_plan, default_name, plan_document, run_paths
from flashrl_cli.train.preflight import shape
from flashrl_cli.train.resume import FROM_NOTHING, Resume, choose
from flashrl_cli.verl import checkpoints
from flashrl_cli.verl.lint import check_overrides
from flashrl_cli.verl.lint.keys import translation
from flashrl_cli.verl.overrides import quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.verl.compose import Tree


def next_attempt(run: RunPaths, *, resume: str) -> int:
    """Number of the attempt to start; a name that was used before is refused unless it is resumed.

    verl goes on silently where a run of the same name left checkpoints.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line's part of a configuration."""

    rollout: str | None = None
    tis: str | None = None
    sets: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.rollout or self.tis or self.sets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two configurations side by side; `values` is None where one was recorded before plans held them."""

    values: list[Difference] | None
    overrides: list[Difference]
    environment: list[Difference]


def read(preset: str, options: Options) -> Resolved:
    """A preset under options, with hints from verl's keys to flashrl's. Raises InputError where it is no valid spec."""
    return read_spec(preset, rollout=options.rollout, tis=options.tis, sets=options.sets, translate=translation)


def preview(preset: str, options: Options) -> tuple[Resolved, LaunchPlan]:
    """A preset and the plan of its first run under its default name. Raises InputError with what the spec has against it."""
    resolved = read(preset, options)
    if resolved.broken:
        raise resolved.refusal(resolved.broken)
    return resolved, _first_plan(resolved)


def _first_plan(resolved: Resolved) -> LaunchPlan:
    return _plan(resolved, default_name(resolved.spec.name, resolved.spec), attempt=1)


def next_plan(
    resolved: Resolved, name: str | None, *, resume: str, look_only: bool = False, force: bool = False
) -> LaunchPlan:
    """Plan of the next attempt of a run; `look_only` plans for a used name, too.

    Raises InputError: for a name in use, a step that cannot be loaded, and, without `force`, for a run that was started with
    another configuration.
    """
    run_name = default_name(resolved.spec.name, resolved.spec) if name is None else name
    run = run_paths(run_name, resolved.spec, paths.runs_root(), paths.checkpoints_root())
    attempt = next_attempt(run, resume="auto" if look_only else resume)
    contents = checkpoints.loaded(map(str, _plan(resolved, run_name, attempt=attempt).overrides))
    plan = _plan(resolved, run_name, attempt=attempt, resume=choose(resolved.spec, run, resume, contents))
    if not (look_only or force):
        refuse(plan)
    return plan


def _plan(resolved: Resolved, name: str, *, attempt: int, resume: Resume = FROM_NOTHING) -> LaunchPlan:
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
    )


def judge(resolved: Resolved, plan: LaunchPlan) -> Tree:
    """verl's configuration of a plan. Raises InputError with all that is wrong with it; EnvironmentNotReady without verl."""
    return check_overrides(resolved, plan.overrides, shape(resolved.spec.model.path))


def check(preset: str, options: Options) -> list[Problem]:
    """What spec, rules or verl's tree have against a preset. Raises EnvironmentNotReady without verl."""
    try:
        resolved = read(preset, options)
        judge(resolved, _first_plan(resolved))
    except InputError as error:
        return list(error.problems) or [Problem(error.message, None, error.hint)]
    return []


def document_of(reference: str, options: Options) -> dict[str, Any]:
    """The plan's document of a preset (with options), or of what a run, an attempt or a plan.json recorded.

    A name that is both a preset's and a run's is the preset's. Raises InputError.
    """
    recorded = None if reference in presets.names() else find_plan(reference)
    if recorded and options:
        raise InputError(
            f"{reference} is recorded in {recorded}: --rollout, --tis and --set change presets only",
            hint=f"flashrl presets diff {reference} PRESET --set …",
        )
    if recorded:
        return read_plan(recorded)
    _must_exist(reference)
    return plan_document(preview(reference, options)[1])


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Compare two plans' documents. Their names, folders and the presets' descriptions are not differences."""
    typed = None
    if "spec" in a and "spec" in b:
        typed = list(differences(_values(a), _values(b), b["origins"]))
    return Comparison(
        values=typed,
        overrides=list(differences(_overrides(a), _overrides(b))),
        environment=list(differences(_environment(a), _environment(b))),
    )


def _must_exist(reference: str) -> None:
    """Raise InputError, with the nearest names of presets and of runs, for one that is neither's."""
    try:
        presets.locate(reference)
    except InputError as error:
        near = get_close_matches(reference, [*presets.names(), *run_names()])
        hint = f"did you mean {' or '.join(near)}?" if near else error.hint
        raise InputError(f"no preset, run or plan {reference!r}", hint=hint) from None


def _values(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in leaves(document["spec"]) if key not in presets.OWN_KEYS}


def _overrides(document: Mapping[str, Any]) -> dict[str, Verbatim]:
    pairs = (text.partition("=") for text in document["overrides"])
    return {key: _without_places(value, document) for key, _, value in pairs}


def _environment(document: Mapping[str, Any]) -> dict[str, Verbatim]:
    """What the plan adds to the environment, less what `env` of the spec says already."""
    said = document.get("spec", {}).get("env", {})
    return {key: _without_places(value, document) for key, value in document["env"].items() if key not in said}


def _without_places(text: str, document: Mapping[str, Any]) -> Verbatim:
    """`text` with the run's own name and folders replaced by what they are."""
    if text == quote(document["name"]):
        return Verbatim("<name>")
    for what, place in sorted(document["files"].items(), key=lambda item: -len(item[1])):
        text = text.replace(place, f"<{what}>")
    return Verbatim(text)

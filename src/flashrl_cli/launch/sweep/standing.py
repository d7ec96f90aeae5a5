"""How a point's run stands before a sweep goes on, and whether it still is the point's run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flashrl_cli.config.difference import differences
from flashrl_cli.config.merge import leaves
from flashrl_cli.errors import InputError
from flashrl_cli.launch.recorded import read_plan
from flashrl_cli.runs import record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.paths import RunPaths

Standing = Literal["waiting", "running", "begun", "done"]

FREE = ("name", "description", "trainer.steps", "trainer.epochs", "trainer.save_every", "trainer.logger", "watch")
"""Keys, or parts, that may change between two attempts: how long and how watched a run is, not what it trains."""


def standing(run: RunPaths, spec: RunSpec) -> Standing:
    """How the run stands to what `spec` wants: `done` has all steps, `begun` an attempt, `running` lives.

    Raises InputError for a run that trained something else.
    """
    attempts = run.attempts()
    if not attempts:
        return "waiting"
    _must_match(run, spec, attempts[-1])
    found = record.load(run.record)
    last = found.last if found else None
    if last and record.state(last) == "running":
        return "running"
    if not last or last.status != "done":
        return "begun"
    wanted = spec.trainer.steps
    return "done" if wanted is None or (last.last_step or 0) >= wanted else "begun"


def _must_match(run: RunPaths, spec: RunSpec, attempt: int) -> None:
    plan = run.attempt(attempt).plan
    before = read_plan(plan).get("spec") if plan.is_file() else None
    if before is None:
        raise InputError(f"run {run.name} exists already: {run.root}", hint="--name gives the sweep's runs other names")
    changed = list(differences(dict(_trained(before)), dict(_trained(spec.model_dump(mode="json")))))
    if changed:
        told = "; ".join(f"{change.key} {' → '.join(change.shown())}" for change in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InputError(
            f"run {run.name} trained something else: {told}{more}",
            hint="--name gives the sweep's runs other names",
        )


def _trained(spec: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in leaves(spec) if not any(f"{key}.".startswith(f"{free}.") for free in FREE))

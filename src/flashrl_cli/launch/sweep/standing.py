"""How a point's run stands before a sweep goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flashrl_cli.runs import record

if TYPE_CHECKING:
    from flashrl_cli.launch.plan import LaunchPlan

Standing = Literal["waiting", "running", "begun", "done"]


def standing(plan: LaunchPlan) -> Standing:
    """How the run of a plan stands: `done` has all the steps that the plan wants, `begun` has an attempt, `running` lives."""
    found = record.load(plan.paths.record)
    last = found.last if found else None
    if last and record.state(last) == "running":
        return "running"
    if plan.is_finished or (last and last.status == "done" and _enough(last.last_step, plan.spec.trainer.steps)):
        return "done"
    return "begun" if plan.paths.attempts() else "waiting"


def _enough(done: int | None, wanted: int | None) -> bool:
    """Whether a run that ended well did the steps wanted; where they follow from epochs, its end says so."""
    return wanted is None or (done or 0) >= wanted

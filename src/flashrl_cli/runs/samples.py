"""Responses that a run kept as text (`plugins.samples`): which of them to show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.plugins import samples
from flashrl_cli.runs.replay import kept_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.plugins.samples import Sample
    from flashrl_cli.runs.store import Run

SCHEMA_VERSION = 1
SHOWN = 8
"""Responses that are shown unless the user says otherwise."""
Order = Literal["worst", "longest", "truncated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Responses of a run in the order in which they are shown, and the steps that they were chosen from."""

    run: str
    steps: tuple[int, ...]
    samples: tuple[Sample, ...]
    damaged: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The responses as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "run": self.run,
            "steps": list(self.steps),
            "samples": [asdict(one) for one in self.samples],
        }


def shown(run: Run, *, step: int | None = None, order: Order | None = None, count: int = SHOWN) -> Shown:
    """At most `count` kept responses: of one step, or of all that were kept if an `order` is given, else of the last.

    Raises NothingMatched if the run kept none, or none of that order; InputError if it lacks the step, or if no file
    can be read.
    """
    files = kept_steps(run, lambda attempt: samples.steps_in(attempt.samples))
    if not files:
        raise NothingMatched(f"run {run.name} kept no responses", hint=_why_none(run))
    if step is not None and step not in files:
        first, last = min(files), max(files)
        raise InputError(f"run {run.name} kept no responses of step {step}", hint=f"there are steps {first} to {last}")
    chosen = [step] if step is not None else list(files) if order else [max(files)]
    found: list[Sample] = []
    damaged: list[InputError] = []
    for one in chosen:
        try:
            found += samples.read(files[one])
        except InputError as error:
            damaged.append(error)
        except FileNotFoundError:  # the run removed its oldest step meanwhile
            continue
    if damaged and not found:
        raise damaged[0]
    ordered = _ordered(found, order)
    if not ordered:
        raise NothingMatched(f"none of the {len(found)} kept responses is {order}", hint="without --truncated")
    messages = tuple(error.message for error in damaged)
    return Shown(run=run.name, steps=tuple(chosen), samples=tuple(ordered[:count]), damaged=messages)


def _ordered(found: Sequence[Sample], order: Order | None) -> list[Sample]:
    match order:
        case "worst":
            return sorted(found, key=lambda one: one.reward)
        case "longest":
            return sorted(found, key=lambda one: -one.length)
        case "truncated":
            return sorted((one for one in found if one.truncated), key=lambda one: -one.step)
        case _:
            return list(found)


def _why_none(run: Run) -> str:
    number = run.paths.attempts()[-1] if run.paths.attempts() else None
    keep = run.setting(number, "trainer", "keep_samples") if number else None
    if keep == 0:
        return "its trainer.keep_samples is 0; 8 is the default"
    if keep is None:
        return "runs that were started before flashrl kept them have none; a new run keeps them"
    return "they are written at the end of a step, where the attempt's folder can be reached from every node"

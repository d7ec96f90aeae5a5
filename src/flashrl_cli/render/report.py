"""Everything that is known of a run, as one document: what `runs report` prints as JSON and renders as a page.

A run without a record, plans or metrics still has a report, of what there is; what could not be read stands in its notes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.config.layers import leaves
from flashrl_cli.config.yaml_file import text_of
from flashrl_cli.errors import InputError
from flashrl_cli.runs import metrics as histories
from flashrl_cli.runs import store as records
from flashrl_cli.runs.curves import starts
from flashrl_cli.runs.metrics import read_metrics
from flashrl_cli.runs.store import read_plan
from flashrl_cli.runs.summary import advice, ran_s, start_shares, step_shares, totals
from flashrl_cli.secrets import HIDDEN, looks_secret, without_secrets
from flashrl_cli.verl.metrics import MISMATCH

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.mismatch import Advice
    from flashrl_cli.runs.store import Attempt, Known, RunRecord
    from flashrl_cli.verl.metrics import StepMetrics

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Sources:
    """What a run left on disk, as far as it can be read; `notes` say what cannot."""

    run: RunPaths
    record: RunRecord | None
    history: list[StepMetrics]
    starts: Sequence[int]
    """Steps after which later attempts went on."""
    plans: Mapping[int, Mapping[str, Any]]
    """Plan documents by attempt."""
    proof: Sequence[Mapping[str, Any]]
    """Handshakes with the number of their attempt."""
    advice: Advice
    """On the newest attempt that logged metrics."""
    notes: Sequence[str]

    @property
    def plan(self) -> Mapping[str, Any]:
        """The newest plan, empty if there is none."""
        return self.plans[max(self.plans)] if self.plans else {}

    @property
    def attempts(self) -> Sequence[Attempt]:
        """Attempts of the record."""
        return self.record.attempts if self.record else ()


def read(known: Known) -> Sources:
    """Read what there is of a run."""
    notes: list[str] = []
    run, found = known.paths, known.record
    if known.damage:
        notes.append(f"The record is left out: {known.damage}.")
    elif found is None:
        notes.append("There is no record (run.json): state, times and causes are not known.")
    history = histories.history(run) if found else _merged(run)
    plans = {number: plan for number in run.attempts() if (plan := _plan(run, number, notes))}
    proof = [shake for number in run.attempts() for shake in _proof(run, found, number, notes)]
    if not history:
        notes.append("No step was logged.")
    if lost := histories.holes(history):
        notes.append(f"Steps without metrics: {', '.join(map(str, lost))}.")
    return Sources(run, found, history, starts(run), plans, proof, advice(known), notes)


def document(sources: Sources) -> dict[str, Any]:
    """The report as plain data; values that look like secrets are hidden."""
    plan, record, last = sources.plan, sources.record, sources.record.last if sources.record else None
    spec = plan.get("spec", {})
    return {
        "schema_version": SCHEMA_VERSION,
        "name": sources.run.name,
        "state": records.state(last) if last else "unknown",
        "preset": record.preset if record else plan.get("preset"),
        "description": spec.get("description") or None,
        "project": record.project if record else spec.get("trainer", {}).get("project"),
        "created": record.created if record else None,
        "checkpoints": record.checkpoints if record else plan.get("files", {}).get("checkpoints"),
        "notes": list(sources.notes),
        "totals": asdict(totals(record, sources.history)),
        "step": [asdict(spent) for spent in step_shares(sources.history, sources.starts)],
        "starts": [_start(attempt) for attempt in sources.attempts if len(attempt.phases) > 1],
        "mismatch": _mismatch(sources),
        "proof": list(sources.proof),
        "attempts": list(_attempts(sources)),
        "configuration": _configuration(plan),
        "overrides": list(without_secrets(tuple(plan.get("overrides", ())))),
        "changes": list(_changes(sources)),
        "environment": {name: _shown(name, value) for name, value in plan.get("env", {}).items()},
        "versions": dict(last.versions) if last else {},
        "git": dict(last.git) if last and last.git else None,
    }


def _merged(run: RunPaths) -> list[StepMetrics]:
    return histories.merge(((number, read_metrics(run.attempt(number).metrics)) for number in run.attempts()), {})


def _plan(run: RunPaths, number: int, notes: list[str]) -> dict[str, Any] | None:
    try:
        return read_plan(run.attempt(number).plan)
    except FileNotFoundError:
        notes.append(f"Attempt {number} left no plan.")
    except InputError as error:
        notes.append(f"The plan of attempt {number} is left out: {error.message}.")
    return None


def _proof(run: RunPaths, record: RunRecord | None, number: int, notes: list[str]) -> list[dict[str, Any]]:
    """Handshakes of an attempt: its files, or what the record holds of them."""
    recorded = next((one.proof for one in record.attempts if one.number == number), ()) if record else ()
    try:
        shakes = list(contract.read_handshakes(run.attempt(number).plugins))
        shakes = shakes or [contract.Handshake(**shake) for shake in recorded]
    except (ValueError, TypeError, AttributeError):
        notes.append(f"A handshake of attempt {number} is damaged.")
        return []
    return [{"attempt": number, **asdict(shake)} for shake in shakes]


def _start(attempt: Attempt) -> dict[str, Any]:
    phases = start_shares(attempt)
    seconds = sum(spent.seconds for spent in phases)
    return {"attempt": attempt.number, "seconds": seconds, "phases": [asdict(spent) for spent in phases]}


def _mismatch(sources: Sources) -> dict[str, Any] | None:
    """Rollout against trainer: each metric's mean, extremes and last value, and the advice; None without metrics."""
    values = {}
    for name in MISMATCH:
        known = [value for metrics in sources.history if (value := metrics[name]) is not None]
        if known:
            values[name] = {
                "mean": sum(known) / len(known),
                "least": min(known),
                "greatest": max(known),
                "last": known[-1],
            }
    return {"values": values, "advice": sources.advice.document()} if values else None


def _attempts(sources: Sources) -> Iterator[dict[str, Any]]:
    """What the attempts' table shows, and how each was started; little is known of one that is not in the record."""
    shown = ("started", "ended", "resumed_from", "last_step", "exit_code", "error", "hint", "host", "executor")
    recorded = {attempt.number: attempt for attempt in sources.attempts}
    for number in sorted({*recorded, *sources.run.attempts()}):
        found = recorded.get(number)
        yield {
            "number": number,
            "state": records.state(found) if found else "unknown",
            **{name: getattr(found, name, None) for name in shown},
            "ran_s": ran_s(found) if found else None,
            "set_aside": list(found.set_aside) if found else [],
            "argv": list(without_secrets(found.argv)) if found else [],
        }


def _configuration(plan: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every value of the preset with where it came from; none for plans that were recorded before they held them."""
    origins = plan.get("origins", {})
    return [
        {"key": key, "value": _shown(key, text_of(value)), "origin": origins.get(key, "")}
        for key, value in leaves(plan.get("spec", {}))
        if key != "description"
    ]


def _changes(sources: Sources) -> list[dict[str, Any]]:
    """What each attempt's plan, versions and git state changed from the attempt before."""
    from flashrl_cli.train.diff import compare

    changes = []
    for before, after in pairwise(sorted(sources.plans)):
        found = compare(sources.plans[before], sources.plans[after])
        listed = found.overrides if found.values is None else found.values
        rows = [(one.key, *one.shown()) for one in (*listed, *found.environment)]
        rows += _other_changes(sources, before, after)
        shown = [{"key": key, "before": _shown(key, a), "after": _shown(key, b)} for key, a, b in rows]
        changes.append({"before": before, "after": after, "differences": shown})
    return changes


def _other_changes(sources: Sources, before: int, after: int) -> list[tuple[str, str, str]]:
    """Versions and git state of two attempts, where they differ."""
    by_number = {attempt.number: attempt for attempt in sources.attempts}
    if not {before, after} <= by_number.keys():
        return []
    a, b = ({**attempt.versions, **_git(attempt)} for attempt in (by_number[before], by_number[after]))
    return [(key, a.get(key, "–"), b.get(key, "–")) for key in {**a, **b} if a.get(key) != b.get(key)]


def _git(attempt: Attempt) -> dict[str, str]:
    return {f"git {key}": text_of(value) for key, value in (attempt.git or {}).items()}


def _shown(key: str, value: str) -> str:
    """The value of a dotted key or a variable, unless it looks like a secret."""
    return HIDDEN if looks_secret(key.rpartition(".")[2], value) else value

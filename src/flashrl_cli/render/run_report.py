"""The report of a run: all that is known about it, as a document and as an HTML page (`flashrl runs report`).

A run without a record, plans or metrics gets a report of what is available; its notes name what could not be read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flashrl_cli.config.layers import leaves
from flashrl_cli.config.yaml_file import text_of
from flashrl_cli.render.figure import panels, replayed, styles
from flashrl_cli.render.html import drawing_note, figures, page
from flashrl_cli.render.run_tables import CORRECTIONS, STALENESS, by_staleness, corrections
from flashrl_cli.runs.curves import SMOOTHING, curve, title
from flashrl_cli.runs.summary import ran_s, start_shares, totals
from flashrl_cli.secrets import HIDDEN, looks_secret, without_secrets
from flashrl_cli.verl.metrics import AT, FRESH, LEARNING_CURVES, MISMATCH, MISMATCH_CURVES, STALENESS_CURVES
from flashrl_cli.verl.metrics import by_staleness as metrics_by_staleness

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flashrl_cli.render.figure import Panel
    from flashrl_cli.runs.curves import Curve
    from flashrl_cli.runs.store import Attempt
    from flashrl_cli.runs.summary import Summary

SCHEMA_VERSION = 1

Changed = Callable[[Mapping[str, Any], Mapping[str, Any]], Sequence[tuple[str, str, str]]]
"""Differences of the second plan document from the first: key, old value, new value."""


def report_page(found: Summary, changed: Changed) -> str:
    """The report as a self-contained HTML page; needs matplotlib and jinja2."""
    document = report_document(found, changed)
    stale = _staleness_panels(found)
    git = {f"git {name}": text_of(value) for name, value in (document["git"] or {}).items()}
    return page(
        "report.html",
        title=document["name"],
        report=document,
        titles={name: title(name) for name in (document["mismatch"] or {"values": ()})["values"]},
        curves=figures(_panels(found, LEARNING_CURVES), "curve"),
        mismatch_curves=figures(_panels(found, MISMATCH_CURVES), "mismatch"),
        staleness=[STALENESS, *by_staleness(found.advice.stale)] if found.advice.stale else [],
        staleness_looks=styles(stale),
        staleness_curves=figures(stale, "staleness"),
        corrections=[CORRECTIONS, *corrections(found.replay)] if found.replay else [],
        correction_pictures=figures(replayed(found.replay), "correction") if found.replay else [],
        start_phases=list(dict.fromkeys(spent["what"] for start in document["starts"] for spent in start["phases"])),
        configuration=[list(rows) for _, rows in itertools.groupby(document["configuration"], key=_part)],
        software=document["versions"] | git,
        note=drawing_note(SMOOTHING, resumed=bool(found.metrics.resumed_after)),
    )


def _panels(found: Summary, metrics: Sequence[str]) -> list[Panel]:
    steps, starts = found.metrics.history, found.metrics.resumed_after
    drawn = {metric: curve(found.run.name, steps, metric, starts) for metric in metrics}
    return panels({metric: [one] for metric, one in drawn.items() if one}, SMOOTHING)


def _staleness_panels(found: Summary) -> list[Panel]:
    """A panel for each metric by staleness, with a curve for each staleness; none in mode `sync`."""
    steps, starts = found.metrics.history, found.metrics.resumed_after
    drawn: dict[str, list[Curve]] = {}
    for name in STALENESS_CURVES:
        for metric in metrics_by_staleness(name, steps):
            number = metric.name.partition(AT)[2]
            label = "scored again" if number == FRESH else f"staleness {number}"
            if one := curve(label, steps, metric.name, starts):
                drawn.setdefault(f"{name}{AT}", []).append(one)
    return panels(drawn, SMOOTHING)


def _part(row: Mapping[str, str]) -> str:
    return row["key"].partition(".")[0]


def report_document(found: Summary, changed: Changed) -> dict[str, Any]:
    """The report of a run as plain data; values that look like secrets are hidden.

    `changed` lists the differences between two plans; see `Changed`.
    """
    plan, record, last = found.plan, found.run.record, found.run.last
    spec = plan.get("spec", {})
    return {
        "schema_version": SCHEMA_VERSION,
        "name": found.run.name,
        "state": found.run.state or "unknown",
        "preset": record.preset if record else plan.get("preset"),
        "description": spec.get("description") or None,
        "project": record.project if record else spec.get("trainer", {}).get("project"),
        "created": record.created if record else None,
        "checkpoints": record.checkpoints if record else plan.get("files", {}).get("checkpoints"),
        "notes": list(found.notes),
        "totals": asdict(totals(record, found.metrics.history)),
        "step": [asdict(spent) for spent in found.step],
        "speed": found.speed.document(),
        "starts": [_start(attempt) for attempt in found.run.attempts if len(attempt.phases) > 1],
        "mismatch": _mismatch(found),
        "correction": found.replay.document() if found.replay else None,
        "samples": [asdict(one) for one in found.samples.samples] if found.samples else [],
        "proof": [{"attempt": number, **asdict(one)} for number, listed in found.handshakes.items() for one in listed],
        "attempts": list(_attempts(found)),
        "configuration": _configuration(plan),
        "overrides": list(without_secrets(tuple(plan.get("overrides", ())))),
        "changes": list(_changes(found, changed)),
        "environment": {name: _shown(name, value) for name, value in plan.get("env", {}).items()},
        "versions": dict(last.versions) if last else {},
        "git": dict(last.git) if last and last.git else None,
    }


def _start(attempt: Attempt) -> dict[str, Any]:
    phases = start_shares(attempt)
    seconds = sum(spent.seconds for spent in phases)
    return {"attempt": attempt.number, "seconds": seconds, "phases": [asdict(spent) for spent in phases]}


def _mismatch(found: Summary) -> dict[str, Any] | None:
    """Mismatch metrics with mean, extremes and last value, and the advice; None without metrics."""
    values = {}
    for name in MISMATCH:
        known = [value for metrics in found.metrics.history if (value := metrics[name]) is not None]
        if known:
            values[name] = {
                "mean": sum(known) / len(known),
                "least": min(known),
                "greatest": max(known),
                "last": known[-1],
            }
    return {"values": values, "advice": found.advice.document()} if values else None


def _attempts(found: Summary) -> Iterator[dict[str, Any]]:
    """Yield the rows of the attempts' table, with how each was started; without a record only numbers are known."""
    shown = ("started", "ended", "resumed_from", "last_step", "exit_code", "error", "hint", "host", "executor")
    recorded = {attempt.number: attempt for attempt in found.run.attempts}
    for one in found.attempts:
        attempt = recorded.get(one.number)
        yield {
            "number": one.number,
            "state": one.state or "unknown",
            **{name: getattr(attempt, name, None) for name in shown},
            "ran_s": ran_s(attempt) if attempt else None,
            "set_aside": list(attempt.set_aside) if attempt else [],
            "argv": list(without_secrets(attempt.argv)) if attempt else [],
        }


def _configuration(plan: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every value of the preset with its origin; empty for plans that were recorded before plans contained them."""
    origins = plan.get("origins", {})
    return [
        {"key": key, "value": _shown(key, text_of(value)), "origin": origins.get(key, "")}
        for key, value in leaves(plan.get("spec", {}))
        if key != "description"
    ]


def _changes(found: Summary, changed: Changed) -> Iterator[dict[str, Any]]:
    """Yield the differences of each attempt's plan, versions and git state from those of the previous attempt."""
    for before, after in itertools.pairwise(sorted(found.plans)):
        rows = [*changed(found.plans[before], found.plans[after]), *_other_changes(found.run.attempts, before, after)]
        shown = [{"key": key, "before": _shown(key, a), "after": _shown(key, b)} for key, a, b in rows]
        yield {"before": before, "after": after, "differences": shown}


def _other_changes(attempts: Sequence[Attempt], before: int, after: int) -> list[tuple[str, str, str]]:
    """Versions and git state that differ between two attempts."""
    by_number = {attempt.number: attempt for attempt in attempts}
    if not {before, after} <= by_number.keys():
        return []
    a, b = ({**attempt.versions, **_git(attempt)} for attempt in (by_number[before], by_number[after]))
    return [(key, a.get(key, "–"), b.get(key, "–")) for key in {**a, **b} if a.get(key) != b.get(key)]


def _git(attempt: Attempt) -> dict[str, str]:
    return {f"git {key}": text_of(value) for key, value in (attempt.git or {}).items()}


def _shown(key: str, value: str) -> str:
    """The value of a dotted key or a variable, hidden if it looks like a secret."""
    return HIDDEN if looks_secret(key.rpartition(".")[2], value) else value

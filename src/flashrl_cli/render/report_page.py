"""The report of a run as one HTML page."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from flashrl_cli.config.text import text_of
from flashrl_cli.render import plots
from flashrl_cli.render.page import figures, page
from flashrl_cli.render.report import document
from flashrl_cli.runs.curves import SMOOTHING, curve, title

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flashrl_cli.render.plots import Panel
    from flashrl_cli.render.report import Sources

LEARNING = ("reward", "accuracy", "response_length", "entropy", "grad_norm", "step_s")
MISMATCH = ("kl", "weight_max", "truncated", "effective")


def report_page(sources: Sources) -> str:
    """The page; needs matplotlib and jinja2."""
    found = document(sources)
    return page(
        "report.html",
        title=found["name"],
        report=found,
        titles={name: title(name) for name in (found["mismatch"] or {"values": ()})["values"]},
        curves=figures(_panels(sources, LEARNING), "curve"),
        mismatch_curves=figures(_panels(sources, MISMATCH), "mismatch"),
        start_phases=list(dict.fromkeys(spent["what"] for start in found["starts"] for spent in start["phases"])),
        configuration=[list(rows) for _, rows in itertools.groupby(found["configuration"], key=_part)],
        software=found["versions"] | {f"git {name}": text_of(value) for name, value in (found["git"] or {}).items()},
        note=drawing_note(SMOOTHING, resumed=bool(sources.starts)),
    )


def drawing_note(weight: float, *, resumed: bool) -> str:
    """How curves are drawn, for those who look at them."""
    bold = f"Bold: exponential moving average with weight {weight:g}; thin: each step." if weight else "Each step."
    return f"{bold} Dotted line: a later attempt went on from there." if resumed else bold


def _part(row: Mapping[str, str]) -> str:
    return row["key"].partition(".")[0]


def _panels(sources: Sources, metrics: Sequence[str]) -> list[Panel]:
    drawn = {metric: curve(sources.run.name, sources.history, metric, sources.starts) for metric in metrics}
    return plots.panels({metric: [one] for metric, one in drawn.items() if one}, SMOOTHING)

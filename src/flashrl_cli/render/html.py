"""Self-contained HTML pages: one file without external resources, light and dark, printable. Needs jinja2."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import __version__
from flashrl_cli.config.yaml_file import text_of
from flashrl_cli.evals.verdicts import p_text
from flashrl_cli.render.figure import VARIABLES, inline_svgs, require, styles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

    from flashrl_cli.render.figure import Panel

_TEMPLATES = Path(__file__).with_name("templates")
_SCALES = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
_DARK_INKS = ("#e4e7eb", "#9aa2ad", "#333a43")
_DARK_CURVES = ("#5aaeea", "#f58b4c", "#3cc79a", "#e2a3c8", "#d8ae3c", "#9ad6f7", "#b795d8", "#a9a9a9")


def curves_page(panels: Sequence[Panel], *, note: str) -> str:
    """A page of curves only, with the names of their runs and a `note` on how they are drawn."""
    looks = styles(panels)
    return page("curves.html", title=" · ".join(looks), looks=looks, figures=figures(panels, "c"), note=note)


def leaderboard_page(document: Mapping[str, Any]) -> str:
    """A page of the leaderboards in an evaluation's document (evals.accuracy.Report)."""
    boards = document["leaderboard"]
    models = len(boards[0]["places"])
    budgets = {k for board in boards for place in board["places"] for k in place["pass_at"]}
    settings = {**document["sampling"], **document["prompting"], "rollout": document["rollout"]}
    return page(
        "leaderboard.html",
        title=f"{models} models on {', '.join(board['dataset'] for board in boards)}",
        boards=boards,
        several=max(budgets, default=0),
        verdicts=document["verdicts"],
        settings={key: text_of(value) for key, value in settings.items()},
    )


def drawing_note(weight: float, *, resumed: bool) -> str:
    """A note for readers on how curves are drawn."""
    bold = f"Bold: exponential moving average with weight {weight:g}; thin: each step." if weight else "Each step."
    return f"{bold} Dotted line: a later attempt went on from there." if resumed else bold


def figures(panels: Sequence[Panel], prefix: str) -> list[tuple[str, Any]]:
    """Title and SVG of each panel; ids in the page begin with `prefix`."""
    from markupsafe import Markup

    drawn = inline_svgs(panels, prefix)  # matplotlib wrote or escaped all text in them
    return [(panel.title, Markup(svg)) for panel, svg in zip(panels, drawn, strict=True)]  # noqa: S704


def page(template: str, **values: Any) -> str:
    """Render a template with `values`, all of which are escaped."""
    require("jinja2")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        one.__name__: one for one in (number, digits, whole, percent, duration, moment, breakable, p_text)
    }
    environment.filters["command"] = shlex.join
    dark = dict(zip(VARIABLES.values(), (*_DARK_INKS, *_DARK_CURVES), strict=True))
    light = {variable: colour for colour, variable in VARIABLES.items()}
    written = datetime.now(UTC).isoformat(timespec="seconds")
    return environment.get_template(template).render(
        values, light=light, dark=dark, version=__version__, written=written
    )


def number(value: float | None) -> str:
    """A number with four digits, integers in full; "–" for None."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:#.4g}"


def digits(value: float) -> str:
    """A reward or an accuracy with three decimals."""
    return f"{value:.3f}"


def whole(value: float | None) -> str:
    """A large number, rounded to an integer; "–" for None."""
    return "–" if value is None else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A share in percent; "–" for None."""
    return "–" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds in at most two units; "–" for None."""
    if seconds is None:
        return "–"
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    size, unit, smaller, part = next(scale for scale in _SCALES if round(seconds) >= scale[0])
    return f"{round(seconds) // size} {unit} {round(seconds) % size // smaller} {part}"


def moment(text: str | None) -> str:
    """A record's time (ISO 8601, UTC) to the minute; "–" for None, and unchanged if it is not a time."""
    if not text:
        return "–"
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M}"
    except ValueError:
        return text


def breakable(key: str) -> Markup:
    """A dotted key, escaped, that may be wrapped after its dots."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(map(escape, key.split(".")))

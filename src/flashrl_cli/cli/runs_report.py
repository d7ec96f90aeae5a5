"""`flashrl runs plot` and `flashrl runs report`: curves of runs, and a run as a page to send to others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashrl_cli.cli import options
from flashrl_cli.cli.options import Json, RunArgument
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from flashrl_cli.render.figure import Panel
    from flashrl_cli.render.output import Output

_PLAIN_WIDTH = 80


def plot(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Names of runs.", autocompletion=options.run_names)
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Metrics: flashrl's names, seconds.PHASE, or verl's own.",
            show_default="reward, accuracy, response_length, kl, truncated, entropy, step_s",
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Draw to a PNG.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Draw to a page that stands alone.")
    ] = None,
    smooth: Annotated[
        float, typer.Option(metavar="W", help="Weight of the past in the moving average: from 0 (none) to below 1.")
    ] = 0.6,
    json: Json = False,
) -> None:
    """Draw metrics of several runs in one picture.

    A panel a metric, each value thin and the moving average bold; in the terminal, unless --png or --html name a file.
    """
    from flashrl_cli.render import figure
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs.curves import gather
    from flashrl_cli.runs.store import known

    if not 0 <= smooth < 1:
        raise InputError(f"--smooth {smooth:g}: not from 0 to below 1", hint="--smooth 0 draws the values alone")
    for package in ("matplotlib",) * bool(png or html) + ("jinja2",) * bool(html):
        figure.require(package)
    output = Output(json_mode=json)
    found = gather([known(name).paths for name in dict.fromkeys(names)], metric)
    for one in found.missing:
        output.warn(one)
    panels = figure.panels(found.panels, smooth)
    if png or html:
        _draw(output, panels, png, html, smooth)
    if json:
        output.document(found.document(smooth))
    elif not (png or html):
        _show(output, panels)


def report(
    name: RunArgument,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="The page.", show_default="report.html in the run's folder"),
    ] = None,
    json: Json = False,
) -> None:
    """Write all that is known of a run to one page.

    A single HTML file that loads nothing: curves, times, mismatch, proof, attempts, configuration, versions. With --json the
    same as data on stdout, and the page only where --out says.
    """
    from flashrl_cli import files
    from flashrl_cli.render import figure
    from flashrl_cli.render.output import Output
    from flashrl_cli.render.page import report_page
    from flashrl_cli.render.report import document, read
    from flashrl_cli.runs.store import known

    output = Output(json_mode=json)
    run = known(name)
    sources = read(run)
    path = out or (None if json else run.paths.root / "report.html")
    if path:
        for package in ("matplotlib", "jinja2"):
            figure.require(package)
        files.write_text(path, report_page(sources))
    if json:
        output.document(document(sources))
    else:
        output.text(str(path))


def _draw(output: Output, panels: list[Panel], png: Path | None, html: Path | None, smooth: float) -> None:
    from flashrl_cli import files
    from flashrl_cli.render.figure import write_png
    from flashrl_cli.render.page import curves_page, drawing_note

    if png:
        write_png(panels, png)
        output.say(f"written to {png}")
    if html:
        resumed = any(one.starts for panel in panels for one in panel.series)
        files.write_text(html, curves_page(panels, note=drawing_note(smooth, resumed=resumed)))
        output.say(f"written to {html}")


def _show(output: Output, panels: list[Panel]) -> None:
    from flashrl_cli.render.figure import text_panels

    terminal = output.stdout.is_terminal
    width = output.stdout.width if terminal else _PLAIN_WIDTH
    output.text(text_panels(panels, width=width, colour=terminal and not output.stdout.no_color))

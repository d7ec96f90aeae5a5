"""`flashrl runs`: list, show, watch, stop and delete runs, and handle their checkpoints."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli import paths
from flashrl_cli.cli import options
from flashrl_cli.cli.options import Json, RunArgument
from flashrl_cli.errors import InputError
from flashrl_cli.text import binary_size, counted, size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flashrl_cli.render.figure import Panel
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs.control import Stopped
    from flashrl_cli.runs.delete import Removal
    from flashrl_cli.runs.store import Run

SCHEMA_VERSION = 1

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of runs.", autocompletion=options.run_names)]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The run's name.", autocompletion=options.run_names, show_default=False)
]

runs = typer.Typer(help="List, show, watch, draw, report, stop and remove runs.", no_args_is_help=True)


@runs.command("ls", epilog="flashrl runs ls --json")
def ls(json: Json = False) -> None:
    """List the runs, the one that changed last first."""
    from flashrl_cli.render import run_tables
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs import summary

    out = Output(json_mode=json)
    rows = summary.rows()
    if json:
        out.document({"schema_version": SCHEMA_VERSION, "runs": [asdict(row) for row in rows]})
        return
    if not rows:
        out.say(f"no runs in {paths.runs_root()}")
        return
    out.text("\n".join(run_tables.listing(rows, out.stdout.width)))
    for row in rows:
        if row.problem:
            out.warn(row.problem)


@runs.command("show", epilog="flashrl runs show tiny-int8-tis2")
def show(name: RunArgument, json: Json = False) -> None:
    """Show one run: attempts, rewards, where its time goes, its proof.

    And how far rollout and trainer are apart, with advice on the cap.
    """
    from flashrl_cli.render import run_tables
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs import store
    from flashrl_cli.runs.summary import summarize

    out = Output(json_mode=json)
    found = summarize(store.find(name))
    if json:
        out.document({"schema_version": SCHEMA_VERSION, **found.document()})
    else:
        run_tables.show(out, found)


@runs.command("watch", epilog="flashrl runs watch tiny-int8-tis2")
def watch(name: RunArgument, json: Json = False) -> None:
    """Watch a run that was started elsewhere, to its end.

    Ends with the run's exit code. Ctrl-C ends only the watching.
    """
    from flashrl_cli import signals
    from flashrl_cli.render.output import Output, end_when_unread
    from flashrl_cli.runs import store

    out = Output(json_mode=json)
    end_when_unread()
    signals.say_if_ignored(out.say)
    try:
        code = _follow(out, store.find(name))
    except KeyboardInterrupt:
        out.say(f"no longer watching; {name} goes on")
        raise
    sys.exit(code)


def _follow(out: Output, run: Run) -> int:
    """Show the newest attempt until it is over, and return its exit code."""
    from flashrl_cli.render.live import display_for
    from flashrl_cli.runs.control import Follower, age

    attempt = run.last
    if attempt is None:
        raise InputError(
            f"run {run.name} has no record to watch: {run.damage or 'it was started before records were kept'}",
            hint=f"`flashrl runs show {run.name}` shows what its folders hold",
        )
    with display_for(out, title=run.name, total=attempt.total_steps, elapsed_s=age(attempt)) as display:
        ending = Follower(run, attempt, display).follow()
    if ending.hint and not out.json_mode:
        out.say(f"hint: {ending.hint}")
    return ending.exit_code


@runs.command("stop", epilog="flashrl runs stop tiny-int8-tis2")
def stop(
    name: RunArgument,
    now: Annotated[bool, typer.Option("--now", help="Kill it instead of waiting until it has ended itself.")] = False,
    json: Json = False,
) -> None:
    """Stop a run that was started in another terminal, and wait for it."""
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs import control, store

    out = Output(json_mode=json)
    ended = control.stop(store.find(name), at_once=now, say=out.say)
    if json:
        out.document({"schema_version": SCHEMA_VERSION, **asdict(ended)})
    else:
        out.text(_stopped(ended))


def _stopped(ended: Stopped) -> str:
    if not ended.stopped:
        return f"{ended.name} is not running: attempt {ended.attempt} is {ended.state}"
    step = "before its first step" if ended.step is None else f"after step {ended.step}"
    return f"stopped {ended.name}, attempt {ended.attempt}, {step} ({ended.seconds:.0f} s)"


@runs.command("rm", epilog="flashrl runs rm old-run older-run --yes")
def rm(
    names: Names,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    keep_checkpoints: Annotated[bool, typer.Option("--keep-checkpoints", help="Remove the records alone.")] = False,
    json: Json = False,
) -> None:
    """Remove runs and their checkpoints, after showing what would go."""
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs import delete

    out = Output(json_mode=json)
    planned = [delete.plan_removal(name, keep_checkpoints=keep_checkpoints) for name in dict.fromkeys(names)]
    _announce(out, planned)
    if not yes:
        if json or not sys.stdin.isatty():
            raise InputError("nothing is removed without being asked for", hint="--yes removes it")
        question = f"remove {'it' if len(planned) == 1 else f'these {len(planned)} runs'}?"
        typer.confirm(question, abort=True, err=True)
    for one in planned:
        delete.remove(one)
        if not json:
            out.text(f"removed {one.run.name}")
    if json:
        out.document({"schema_version": SCHEMA_VERSION, "removed": [one.document() for one in planned]})


def _announce(out: Output, planned: Sequence[Removal]) -> None:
    """Print what would be deleted on stderr, with sizes."""
    from flashrl_cli.render.run_tables import aligned

    rows = []
    for one in planned:
        rows.append((str(one.root), size(one.root_bytes)))
        rows += [(str(one.checkpoints), size(one.checkpoint_bytes))] if one.checkpoints else []
    total = sum(one.bytes for one in planned)
    out.say("\n".join(aligned([*rows, ("together", size(total))], right=(1,))))
    for one in planned:
        if one.warning:
            out.warn(one.warning)


@runs.command("checkpoints")
def checkpoints(
    name: Name,
    *,
    keep: Annotated[
        str | None,
        typer.Option(metavar="RULES", help="Delete all steps but these: last:N, best:N, every:N, joined by commas."),
    ] = None,
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="Delete the steps that a resume moved out of its way.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would go; delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    json: Json = False,
) -> None:
    """List a run's checkpoints: complete or not, how large, how good.

    With --keep delete all but some: the newest complete step, the best one, and the one that verl goes on from stay
    always.

    flashrl runs checkpoints tiny-int8-tis2 --keep last:3,best:1,every:50 --dry-run
    """
    from flashrl_cli.render.output import Output
    from flashrl_cli.render.run_tables import show_checkpoints, show_prune
    from flashrl_cli.runs import delete, saved, store

    out = Output(json_mode=json)
    run = store.find(name).recorded_paths()
    listed = saved.list_checkpoints(run)
    if keep is None and not set_aside:
        if dry_run or yes:
            raise InputError("--dry-run and --yes belong to --keep or --set-aside")
        if json:
            out.document({"schema_version": SCHEMA_VERSION, **listed.document()})
        else:
            show_checkpoints(out, listed)
        return
    rules = delete.parse_keep(keep) if keep is not None else None
    planned = delete.plan_prune(listed, rules, set_aside=set_aside)
    going = bool(planned.going) and not dry_run
    if not json:
        show_prune(out, planned)
    if going:
        saved.refuse_while_running(run, "nothing is deleted")
        if not yes:
            if json or not (sys.stdin.isatty() and sys.stderr.isatty()):
                raise InputError("nothing is deleted without consent", hint="--yes deletes, --dry-run only shows")
            typer.confirm(f"delete {binary_size(planned.freed)} for good?", abort=True, err=True)
        delete.prune(run, rules, set_aside=set_aside, shown=planned)
    if json:
        about = {"schema_version": SCHEMA_VERSION, "run": run.name, "checkpoints": str(run.checkpoints)}
        out.document({**about, **planned.document(), "deleted": going})
    elif going:
        out.say(f"deleted: {binary_size(planned.freed)} are free again")


@runs.command("export")
def export(
    name: Name,
    step: Annotated[str, typer.Argument(metavar="STEP", help="A step's number, latest, or best.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the model.")],
    *,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload it to this repository of the Hugging Face hub."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public, not private.", show_default=False)
    ] = False,
    json: Json = False,
) -> None:
    """Export a step as a Hugging Face model: config, tokenizer, weights, a model card.

    The weights are compared with what the config asks for before the folder appears.

    flashrl runs export tiny-int8-tis2 best ./tiny-math
    """
    from flashrl_cli import files
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs import export as exports
    from flashrl_cli.runs import merge, saved, store

    if public and push is None:
        raise InputError("--public belongs to --push")
    out = Output(json_mode=json)
    hub = exports.repository(push) if push is not None else None
    target = merge.new_folder(paths.absolute(folder))
    listed = saved.list_checkpoints(store.find(name).recorded_paths())
    found = exports.choose(listed, step)
    out.say(f"exporting step {found.step} of {name} …")
    with files.alone(target, lambda: out.say(f"another command writes to {target}: waiting for it")):
        made = exports.export(listed, found, merge.new_folder(target))
    url = hub.upload(target, private=not public, message=f"{name}, step {found.step}") if hub else None
    if json:
        out.document({"schema_version": SCHEMA_VERSION, **made.document(), "pushed": url})
        return
    out.text(str(target))
    out.say(
        f"{counted(made.tensors, 'tensor')}, {counted(made.parameters, 'parameter')}, {binary_size(made.bytes)}, "
        f"{made.compared}"
    )
    if url:
        out.say(f"uploaded to {url}")


@runs.command("correction", epilog="flashrl runs correction tiny-int8-tis2 --last 20 --png correction.png")
def correction(
    name: RunArgument,
    *,
    step: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="This step alone.", show_default="the last steps")
    ] = None,
    last: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="The last K steps that were kept.", show_default="5")
    ] = None,
    staleness: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Responses alone whose most stale token has this staleness."),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Draw log-ratios and weights by position to a PNG."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare corrections on the log-ratios that a run kept.

    For each kind and cap: bias, effective sample size, tokens touched, and the estimated error of the gradient, the
    least one first.
    """
    from flashrl_cli.render import figure, run_tables
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs import replay, store

    if step is not None and last is not None:
        raise InputError("--step and --last exclude each other", hint="--step N is one step, --last K are the newest")
    if png:
        figure.require("matplotlib")
    out = Output(json_mode=json)
    found = replay.replay_run(store.find(name), step=step, last=last or replay.RECENT, staleness=staleness)
    for one in found.damaged:
        out.warn(one)
    if png:
        figure.write_png(figure.replayed(found), png)
        out.say(f"written to {png}")
    if json:
        out.document({"schema_version": SCHEMA_VERSION, "run": name, **found.document()})
    else:
        run_tables.show_correction(out, found)


@runs.command("samples", epilog="flashrl runs samples tiny-int8-tis2 --worst")
def samples(
    name: RunArgument,
    *,
    step: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="This step alone.", show_default="the last one")
    ] = None,
    worst: Annotated[bool, typer.Option("--worst", help="The least rewarded first, of all steps.")] = False,
    longest: Annotated[bool, typer.Option("--longest", help="The longest first, of all steps.")] = False,
    truncated: Annotated[
        bool, typer.Option("--truncated", help="Only those as long as a response may be, the newest first.")
    ] = False,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of responses.")] = 8,
    full: Annotated[bool, typer.Option("--full", help="Complete texts.")] = False,
    json: Json = False,
) -> None:
    """Show responses that a run was trained on.

    With reward, length, advantage and importance weights. A run keeps eight a step (trainer.keep_samples): the least
    rewarded, the longest, and others at random.
    """
    from flashrl_cli.render.examples import sample_lines
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs import store
    from flashrl_cli.runs.samples import Order, shown

    given: dict[Order, bool] = {"worst": worst, "longest": longest, "truncated": truncated}
    asked = [order for order, chosen in given.items() if chosen]
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]} exclude each other")
    out = Output(json_mode=json)
    found = shown(store.find(name), step=step, order=asked[0] if asked else None, count=n)
    for one in found.damaged:
        out.warn(one)
    if json:
        out.document(found.document())
        return
    for number, sample in enumerate(found.samples):
        out.text("\n".join(([""] if number else []) + list(sample_lines(asdict(sample), width=_width(out), full=full))))


def _width(out: Output) -> int:
    from flashrl_cli.render.run_tables import PLAIN

    return out.stdout.width if out.stdout.is_terminal else PLAIN


@runs.command("plot", epilog="flashrl runs plot int8 bf16 --metric reward,kl --png curves.png")
def plot(
    names: Names,
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
    from flashrl_cli.runs import store
    from flashrl_cli.runs.curves import gather

    if not 0 <= smooth < 1:
        raise InputError(f"--smooth {smooth:g}: not from 0 to below 1", hint="--smooth 0 draws the values alone")
    for package in ("matplotlib",) * bool(png or html) + ("jinja2",) * bool(html):
        figure.require(package)
    out = Output(json_mode=json)
    found = gather([store.find(name).paths for name in dict.fromkeys(names)], metric)
    for one in found.missing:
        out.warn(one)
    panels = figure.panels(found.panels, smooth)
    if png or html:
        _draw(out, panels, png, html, smooth)
    if json:
        out.document(found.document(smooth))
    elif not (png or html):
        _show_curves(out, panels)


def _draw(out: Output, panels: list[Panel], png: Path | None, html: Path | None, smooth: float) -> None:
    from flashrl_cli import files
    from flashrl_cli.render.figure import write_png
    from flashrl_cli.render.html import curves_page, drawing_note

    if png:
        write_png(panels, png)
        out.say(f"written to {png}")
    if html:
        resumed = any(one.starts for panel in panels for one in panel.series)
        files.write_text(html, curves_page(panels, note=drawing_note(smooth, resumed=resumed)))
        out.say(f"written to {html}")


def _show_curves(out: Output, panels: list[Panel]) -> None:
    from flashrl_cli.render.run_tables import PLAIN
    from flashrl_cli.render.text_plot import text_panels

    terminal = out.stdout.is_terminal
    width = out.stdout.width if terminal else PLAIN
    out.text(text_panels(panels, width=width, colour=terminal and not out.stdout.no_color))


@runs.command("report", epilog="flashrl runs report tiny-int8-tis2 --out report.html")
def report(
    name: RunArgument,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="The page.", show_default="report.html in the run's folder"),
    ] = None,
    json: Json = False,
) -> None:
    """Write all that is known of a run to one page.

    A single HTML file that loads nothing: curves, times, mismatch, proof, attempts, configuration, versions. With
    --json the same as data on stdout, and the page only where --out says.
    """
    from flashrl_cli import files
    from flashrl_cli.render import figure
    from flashrl_cli.render.output import Output
    from flashrl_cli.render.run_report import report_document, report_page
    from flashrl_cli.runs import store
    from flashrl_cli.runs.summary import summarize

    output = Output(json_mode=json)
    run = store.find(name)
    found = summarize(run)
    path = out or (None if json else run.paths.root / "report.html")
    if path:
        for package in ("matplotlib", "jinja2"):
            figure.require(package)
        files.write_text(path, report_page(found, _changed))
    if json:
        output.document(report_document(found, _changed))
    else:
        output.text(str(path))


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Values of a preset (or verl's overrides, where a plan lacks them) and variables that changed between plans."""
    from flashrl_cli.train.diff import compare

    found = compare(before, after)
    listed = found.overrides if found.values is None else found.values
    return [(one.key, *one.shown()) for one in (*listed, *found.environment)]

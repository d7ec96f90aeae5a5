"""`flashrl runs`: what was trained and how it went; watch, stop and remove what another terminal started."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from flashrl_cli.cli import options
from flashrl_cli.cli.options import Json, RunArgument
from flashrl_cli.cli.runs_checkpoints import checkpoints, export
from flashrl_cli.cli.runs_report import plot, report
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.render.output import Output
    from flashrl_cli.runs.control import Stopped
    from flashrl_cli.runs.delete import Removal
    from flashrl_cli.runs.store import Known

SCHEMA_VERSION = 1

runs = typer.Typer(help="List, show, watch, draw, report, stop and remove runs.", no_args_is_help=True)


@runs.command("ls", epilog="flashrl runs ls --json")
def ls(json: Json = False) -> None:
    """List the runs, the one that changed last first."""
    from flashrl_cli import paths
    from flashrl_cli.render import runs as shown
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs import summary

    out = Output(json_mode=json)
    rows = summary.rows()
    if json:
        out.document({"schema_version": SCHEMA_VERSION, "runs": [row.document() for row in rows]})
        return
    if not rows:
        out.say(f"no runs in {paths.runs_root()}")
        return
    out.text("\n".join(shown.listing(rows, out.stdout.width)))
    for row in rows:
        if row.problem:
            out.warn(row.problem)


@runs.command("show", epilog="flashrl runs show tiny-int8-tis2")
def show(name: RunArgument, json: Json = False) -> None:
    """Show one run: attempts, rewards, where its time goes, its proof.

    And how far rollout and trainer are apart, with advice on the cap.
    """
    from flashrl_cli.render import runs as shown
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs.store import known
    from flashrl_cli.runs.summary import detail

    out = Output(json_mode=json)
    found = detail(known(name))
    if json:
        out.document({"schema_version": SCHEMA_VERSION, **found.document()})
    else:
        shown.show(out, found)


@runs.command("watch", epilog="flashrl runs watch tiny-int8-tis2")
def watch(name: RunArgument, json: Json = False) -> None:
    """Watch a run that was started elsewhere, to its end.

    Ends with the run's exit code. Ctrl-C ends only the watching.
    """
    from flashrl_cli.render.output import Output, end_when_unread
    from flashrl_cli.runs.store import known
    from flashrl_cli.train import process

    out = Output(json_mode=json)
    end_when_unread()
    process.say_if_ignored(out.say)
    try:
        code = _follow(out, known(name))
    except KeyboardInterrupt:
        out.say(f"no longer watching; {name} goes on")
        raise
    sys.exit(code)


def _follow(out: Output, run: Known) -> int:
    """Show the newest attempt until it is over, and return its exit code."""
    from flashrl_cli.render.live import display_for
    from flashrl_cli.runs.control import Follower, age

    attempt = run.last
    if attempt is None:
        raise InputError(
            f"run {run.name} has no record to watch: {run.damage or 'it was started before records were kept'}",
            hint=f"`flashrl runs show {run.name}` shows what its folders tell",
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
    from flashrl_cli.runs import control
    from flashrl_cli.runs.store import known

    out = Output(json_mode=json)
    ended = control.stop(known(name), at_once=now, say=out.say)
    if json:
        out.document({"schema_version": SCHEMA_VERSION, **asdict(ended)})
    else:
        out.text(_told(ended))


def _told(ended: Stopped) -> str:
    if not ended.stopped:
        return f"{ended.name} is not running: attempt {ended.attempt} is {ended.state}"
    step = "before its first step" if ended.step is None else f"after step {ended.step}"
    return f"stopped {ended.name}, attempt {ended.attempt}, {step} ({ended.seconds:.0f} s)"


@runs.command("rm", epilog="flashrl runs rm old-run older-run --yes")
def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Names of runs.", autocompletion=options.run_names)
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    keep_checkpoints: Annotated[bool, typer.Option("--keep-checkpoints", help="Remove the records alone.")] = False,
    json: Json = False,
) -> None:
    """Remove runs and their checkpoints, after showing what would go."""
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs import delete

    out = Output(json_mode=json)
    planned = [delete.plan(name, keep_checkpoints=keep_checkpoints) for name in dict.fromkeys(names)]
    _announce(out, planned)
    if not yes:
        _ask(out, len(planned))
    for one in planned:
        delete.remove(one)
        if not json:
            out.text(f"removed {one.run.name}")
    if json:
        out.document({"schema_version": SCHEMA_VERSION, "removed": [one.document() for one in planned]})


def _announce(out: Output, planned: Sequence[Removal]) -> None:
    """Tell what would go, with sizes."""
    from flashrl_cli.render.runs import aligned
    from flashrl_cli.text import size

    rows = []
    for one in planned:
        rows.append((str(one.root), size(one.root_bytes)))
        rows += [(str(one.checkpoints), size(one.checkpoint_bytes))] if one.checkpoints else []
    total = sum(one.bytes for one in planned)
    out.say("\n".join(aligned([*rows, ("together", size(total))], right=(1,))))
    for one in planned:
        if one.warning:
            out.warn(one.warning)


def _ask(out: Output, count: int) -> None:
    """Ask whether to go on; exits with 1 on a no. Raises InputError where nobody can answer."""
    if out.json_mode or not _interactive():
        raise InputError("nothing is removed without being asked for", hint="--yes removes it")
    typer.confirm(f"remove {'it' if count == 1 else f'these {count} runs'}?", abort=True, err=True)


def _interactive() -> bool:
    return sys.stdin.isatty()


runs.command("checkpoints")(checkpoints)
runs.command("export")(export)
runs.command("plot", epilog="flashrl runs plot int8 bf16 --metric reward,kl --png curves.png")(plot)
runs.command("report", epilog="flashrl runs report tiny-int8-tis2 --out report.html")(report)

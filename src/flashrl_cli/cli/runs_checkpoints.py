"""`flashrl runs checkpoints` and `flashrl runs export`: what a run saved, what of it stays, and a model to give away."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli import paths
from flashrl_cli.cli import options
from flashrl_cli.cli.options import Json
from flashrl_cli.errors import InputError
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.render.output import Output
    from flashrl_cli.runs.checkpoints import Stock
    from flashrl_cli.runs.delete import Prune
    from flashrl_cli.runs.saved import Saved

SCHEMA_VERSION = 1

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The run's name.", autocompletion=options.run_names, show_default=False)
]


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

    With --keep delete all but some: the newest complete step, the best one, and the one that verl goes on from stay always.

    flashrl runs checkpoints tiny-int8-tis2 --keep last:3,best:1,every:50 --dry-run
    """
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs.checkpoints import take_stock
    from flashrl_cli.runs.delete import judge, parse_keep

    output = Output(json_mode=json)
    stock = take_stock(_run(name))
    if keep is None and not set_aside:
        if dry_run or yes:
            raise InputError("--dry-run and --yes belong to --keep or --set-aside")
        _show(output, stock)
        return
    rules = parse_keep(keep) if keep is not None else None
    planned = judge(stock, rules, set_aside=set_aside)
    if not json:
        _show_plan(output, planned)
    if planned.going and not dry_run:
        from flashrl_cli.runs.checkpoints import refuse_while_running
        from flashrl_cli.runs.delete import carry_out

        refuse_while_running(stock.run, "nothing is deleted")
        _ask(output, f"delete {_size(planned.freed)} for good?", yes=yes)
        carry_out(stock.run, rules, set_aside=set_aside, shown=planned)
    if json:
        output.document(_pruned(stock, planned, done=not dry_run))
    elif planned.going and not dry_run:
        output.say(f"deleted: {_size(planned.freed)} are free again")


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
    from flashrl_cli.runs import merge
    from flashrl_cli.runs.checkpoints import take_stock

    if public and push is None:
        raise InputError("--public belongs to --push")
    output = Output(json_mode=json)
    hub = exports.repository(push) if push is not None else None
    target = merge.new_folder(paths.absolute(folder))
    stock = take_stock(_run(name))
    found = exports.choose(stock, step)
    output.say(f"exporting step {found.step} of {name} …")
    with files.alone(target, lambda: output.say(f"another command writes to {target}: waiting for it")):
        made = exports.export(stock, found, merge.new_folder(target))
    url = hub.upload(target, private=not public, message=f"{name}, step {found.step}") if hub else None
    if json:
        output.document({"schema_version": SCHEMA_VERSION, **made.document(), "pushed": url})
        return
    output.text(str(target))
    output.say(
        f"{counted(made.tensors, 'tensor')}, {counted(made.parameters, 'parameter')}, {_size(made.bytes)}, {made.compared}"
    )
    if url:
        output.say(f"uploaded to {url}")


def _run(name: str) -> paths.RunPaths:
    """Where the run of that name lies, as its record says. Raises InputError without a record, NothingMatched for no run."""
    from flashrl_cli.runs.checkpoints import run_paths
    from flashrl_cli.runs.store import known

    run = known(name)
    if run.record is None:
        raise InputError(
            f"run {name} has no record that says where its checkpoints lie: {run.damage or 'it is older'}",
            hint=f"`flashrl runs show {name}` shows what its folders tell",
        )
    return run_paths(run.record)


def _ask(output: Output, question: str, *, yes: bool) -> None:
    """Go on only with a person's consent. Raises InputError where none can be asked."""
    if yes:
        return
    if output.json_mode or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError("nothing is deleted without consent", hint="--yes deletes, --dry-run only shows")
    typer.confirm(question, abort=True, err=True)


def _show(output: Output, stock: Stock) -> None:
    from flashrl_cli.runs.checkpoints import writers

    if output.json_mode:
        output.document(_document(stock))
        return
    if not stock.saved and not stock.set_aside:
        output.say(f"no checkpoints in {stock.run.checkpoints}")
        return
    score = {"evaluation": "accuracy (evaluation)", "validation": "accuracy (validation)", "reward": "reward"}
    columns = ["step", "state", "size", "HF weights", score[stock.scores.by] if stock.scores else "score", "", "age"]
    output.table(columns, [_row(stock, one) for one in stock.saved])
    if any(writers(stock.run.checkpoints)):
        output.say("the run is running: a step that is incomplete may be being saved")
    _show_set_aside(output, stock)


def _show_set_aside(output: Output, stock: Stock) -> None:
    if stock.set_aside:
        rows = [[one.path.name, _size(one.bytes), one.reason] for one in stock.set_aside]
        output.table(["set aside", "size", "why"], rows)
        output.say(f"`flashrl runs checkpoints {stock.run.name} --set-aside` deletes what was set aside")
    if stock.leftovers:
        size = _size(sum(one.bytes for one in stock.leftovers))
        output.say(f"an interrupted prune left {size}: the next one deletes them")


def _row(stock: Stock, one: Saved) -> list[object]:
    score = stock.scores.values.get(one.step) if stock.scores else None
    age = _age(time.time() - one.written)
    return [one.step, _state(one), _size(one.bytes), one.has_hf, score, ", ".join(_marks(stock, one)), age]


def _state(one: Saved) -> str:
    if one.complete:
        return "complete"
    more = f" and {len(one.problems) - 1} more" if len(one.problems) > 1 else ""
    return f"incomplete: {one.problems[0]}{more}"


def _marks(stock: Stock, one: Saved) -> list[str]:
    marks = {"newest": one.step == stock.newest, "best": one.step == stock.best, "tracked": one.tracked}
    return [mark for mark, holds in marks.items() if holds] + (["LoRA"] if one.lora else [])


def _show_plan(output: Output, planned: Prune) -> None:
    rows: list[Sequence[object]] = [
        [v.saved.step, "stays" if v.stays else "goes", ", ".join(v.stays) or _state(v.saved), _size(v.saved.bytes)]
        for v in planned.verdicts
    ]
    hidden = [(one, "set aside") for one in planned.set_aside]
    hidden += [(one, "left by an interrupted prune") for one in planned.leftovers]
    rows += [[one.path.name, "goes", why, _size(one.bytes)] for one, why in hidden]
    output.table(["step", "", "why", "size"], rows)
    output.say(f"{len(planned.going)} go, which frees {_size(planned.freed)}")


def _document(stock: Stock) -> dict[str, Any]:
    """All that is known of a run's checkpoints, as one JSON document."""
    by = stock.scores.by if stock.scores else None
    values = stock.scores.values if stock.scores else {}
    steps = [
        {
            **asdict(one),
            "path": str(one.path),
            "complete": one.complete,
            "newest": one.step == stock.newest,
            "best": one.step == stock.best,
            "score": values.get(one.step),
        }
        for one in stock.saved
    ]
    aside = [{"path": str(one.path), "bytes": one.bytes, "reason": one.reason} for one in stock.set_aside]
    return {
        "schema_version": SCHEMA_VERSION,
        "run": stock.run.name,
        "checkpoints": str(stock.run.checkpoints),
        "score_by": by,
        "steps": steps,
        "set_aside": aside,
    }


def _pruned(stock: Stock, planned: Prune, *, done: bool) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "run": stock.run.name,
        "checkpoints": str(stock.run.checkpoints),
        "steps": [{"step": v.saved.step, "stays": list(v.stays), "bytes": v.saved.bytes} for v in planned.verdicts],
        "going": [str(path) for path in planned.going],
        "bytes": planned.freed,
        "deleted": done and bool(planned.going),
    }


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"

"""`flashrl presets`: list and show presets, the origin of their values, and whether verl accepts them."""

from __future__ import annotations

from dataclasses import asdict
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from flashrl_cli.cli import options as complete
from flashrl_cli.cli.options import NAME_OR_FILE, Json, PresetArgument, Rollout, Sets, Tis
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flashrl_cli.config.resolve import Summary
    from flashrl_cli.errors import Problem
    from flashrl_cli.render.output import Output
    from flashrl_cli.train.diff import Comparison

SCHEMA_VERSION = 1

presets = typer.Typer(help="List, show, compare, copy and check presets.", no_args_is_help=True)


@presets.command("ls", epilog="flashrl presets ls --json")
def ls(json: Json = False) -> None:
    """List the presets: the shipped ones and those in ./presets."""
    from flashrl_cli.config.resolve import catalog
    from flashrl_cli.render.output import Output

    out = Output(json_mode=json)
    found = list(catalog())
    if json:
        out.document({"schema_version": SCHEMA_VERSION, "presets": [asdict(summary) for summary in found]})
        return
    _print_catalog(out, found)
    for summary in found:
        if summary.error:
            out.warn(f"{summary.error} (flashrl presets check {summary.name})")


@presets.command("show", epilog="flashrl presets show dapo-32b --tis 8 --set rollout.n=8 --origins")
def show(
    preset: PresetArgument,
    rollout: Rollout = None,
    tis: Tis = None,
    sets: Sets = None,
    origins: Annotated[bool, typer.Option("--origins", help="Also where each value comes from.")] = False,
    verl: Annotated[bool, typer.Option("--verl", help="The overrides that verl gets, word for word.")] = False,
    json: Json = False,
) -> None:
    """Show every value of a preset, with --origins where it comes from."""
    from flashrl_cli.config.layers import leaves
    from flashrl_cli.config.resolve import Options
    from flashrl_cli.config.yaml_file import text_of
    from flashrl_cli.render.output import Output
    from flashrl_cli.train.launch import preview

    out = Output(json_mode=json)
    resolved, plan = preview(preset, Options(rollout=rollout, tis=tis, sets=sets or ()))
    values = dict(leaves(resolved.spec.model_dump(mode="json")))
    where = {key: str(origin) for key, origin in resolved.origins.items()}
    overrides = [(str(override), str(override.origin)) for override in plan.overrides]
    if json:
        document = {"schema_version": SCHEMA_VERSION, "preset": plan.preset, "values": values, "origins": where}
        launched = [{"override": text, "origin": origin} for text, origin in overrides]
        out.document(document | ({"verl": launched} if verl else {}))
    elif verl:
        out.text("\n".join(_aligned(overrides if origins else [(text,) for text, _ in overrides])))
    else:
        _print_sections(out, [(key, text_of(value), *([where[key]] * origins)) for key, value in values.items()])


@presets.command("diff", epilog="flashrl presets diff demo tiny --tis off")
def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A preset, or what was recorded: a run, an attempt's folder, a plan.json.",
            autocompletion=complete.preset_and_run_names,
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(
            metavar="B",
            help="The same; --rollout, --tis and --set apply to B alone.",
            autocompletion=complete.preset_and_run_names,
        ),
    ],
    rollout: Rollout = None,
    tis: Tis = None,
    sets: Sets = None,
    verl: Annotated[bool, typer.Option("--verl", help="Compare verl's overrides, not the preset's values.")] = False,
    json: Json = False,
) -> None:
    """Show what differs between presets or runs.

    What did I change since the run that worked? `flashrl presets diff RUN PRESET`.
    """
    from flashrl_cli.config.resolve import NO_OPTIONS, Options
    from flashrl_cli.render.output import Output
    from flashrl_cli.train.diff import compare, document_of

    out = Output(json_mode=json)
    options = Options(rollout=rollout, tis=tis, sets=sets or ())
    found = compare(document_of(a, NO_OPTIONS), document_of(b, options))
    if json:
        kinds = {"values": found.values, "overrides": found.overrides, "environment": found.environment}
        shown = {kind: None if listed is None else [d.data() for d in listed] for kind, listed in kinds.items()}
        out.document({"schema_version": SCHEMA_VERSION, "a": a, "b": b, **shown})
    else:
        _print_comparison(out, found, (a, b), verl=verl)


@presets.command("copy", epilog="flashrl presets copy dapo-32b presets/mine.yaml")
def copy(
    preset: PresetArgument,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="The copy: a file (.yaml is added if it lacks), or a folder.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Copy a preset to a file of your own, comments and all, to edit it."""
    from flashrl_cli.config.presets import copy_preset, shortest
    from flashrl_cli.render.output import Output

    out = Output()
    path = shortest(copy_preset(preset, file, force=force))
    out.text(path)
    out.say(f"edit it, then `flashrl presets check {path}` and `flashrl train --preset {path}`")


@presets.command("check", epilog="flashrl presets check mine.yaml --rollout int8 --tis 2")
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=f"[{NAME_OR_FILE}]...", help="Default: all presets.", autocompletion=complete.preset_names
        ),
    ] = None,
    rollout: Rollout = None,
    tis: Tis = None,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Check presets: their values, the rules between them, verl's keys.

    Without a name all of them. Exit 2 if one has a problem.
    """
    from flashrl_cli.config import presets as files
    from flashrl_cli.config.resolve import Options
    from flashrl_cli.render.output import Output
    from flashrl_cli.train import launch

    out = Output(json_mode=json)
    options = Options(rollout=rollout, tis=tis, sets=sets or ())
    found: dict[str, list[Problem]] = {}
    for name in names or files.names():
        found[name] = launch.check(name, options)
        if not json:
            _print_verdict(out, name, found[name])
    if json:
        verdicts = [{"preset": n, "ok": not p, "problems": [one.document() for one in p]} for n, p in found.items()]
        out.document({"schema_version": SCHEMA_VERSION, "presets": verdicts})
    if refused := [name for name, problems in found.items() if problems]:
        raise InputError(f"{len(refused)} of {len(found)} presets refused: {', '.join(refused)}")


@presets.command("schema", epilog="flashrl presets schema > preset.schema.json")
def schema() -> None:
    """Print the JSON schema of a preset file.

    Editors complete and check YAML by it; every key's meaning is in it.
    """
    from flashrl_cli.config.schema import preset_schema
    from flashrl_cli.render.output import Output

    Output(json_mode=True).document(preset_schema())


def _print_catalog(out: Output, found: Sequence[Summary]) -> None:
    """Print one row per preset; descriptions are wrapped to the remaining width."""
    rows = [("name", "model", "algorithm", "rollout", "TIS", "GPUs", "description")]
    for one in found:
        cap = "" if one.tis is None else f"{one.tis:g}"
        rows.append((one.name, one.model, one.advantage, one.rollout, cap, one.devices, one.description))
    left = [f"{line}  " for line in _aligned([row[:-1] for row in rows])]
    width = max(map(len, left))
    for start, row in zip(left, rows, strict=True):
        first, *more = wrap(row[-1], max(24, out.stdout.width - width)) or [""]
        out.text("\n".join([f"{start:{width}}{first}", *(" " * width + line for line in more)]))


def _print_sections(out: Output, rows: Iterable[Sequence[str]]) -> None:
    """Print rows of (dotted key, …): an aligned block for each part of a preset."""
    parts: dict[str, list[Sequence[str]]] = {}
    for row in rows:
        parts.setdefault(row[0].partition(".")[0], []).append(row)
    out.text("\n\n".join("\n".join(_aligned(part)) for part in parts.values()))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _print_comparison(out: Output, found: Comparison, labels: tuple[str, str], *, verl: bool) -> None:
    listed = found.overrides if verl or found.values is None else found.values
    if found.values is None and not verl:
        out.say("note: one of these was recorded before plans held the preset's values: these are verl's overrides")
    if not listed and not found.environment:
        out.text(f"no difference between {' and '.join(labels)}")
    else:
        out.text(" → ".join(labels))
    if listed:
        out.text("")
        _print_sections(out, [(d.key, f"{' → '.join(d.shown())}", d.origin) for d in listed])
    if found.environment:
        out.text("\nenvironment")
        out.text("\n".join(_aligned([(d.key, " → ".join(d.shown())) for d in found.environment])))
    if found.overrides and not listed:
        out.say("verl's overrides differ nevertheless: --verl shows them")


def _print_verdict(out: Output, name: str, problems: Sequence[Problem]) -> None:
    out.text(f"{'✗' if problems else '✓'} {name}")
    for problem in problems:
        out.text(f"    {problem.where}: {problem.message}" if problem.where else f"    {problem.message}")
        if problem.hint:
            out.text(f"      hint: {problem.hint}")

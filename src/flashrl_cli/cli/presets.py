"""`flashrl presets`: what can be trained, and where each of a preset's values comes from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from flashrl_cli.cli.options import Json, Rollout, Sets, Tis

SCHEMA_VERSION = 1

presets = typer.Typer(help="List and show presets.", no_args_is_help=True)


@presets.command("ls", epilog="flashrl presets ls --json")
def ls(json: Json = False) -> None:
    """List the presets: the shipped ones and those in ./presets."""
    from flashrl_cli.config.catalog import catalog
    from flashrl_cli.render.output import Output

    out = Output(json_mode=json)
    found = list(catalog())
    if json:
        out.document({"schema_version": SCHEMA_VERSION, "presets": [asdict(summary) for summary in found]})
        return
    columns = ("name", "model", "advantage", "rollout", "devices", "description")
    out.table(columns, [[getattr(summary, column) for column in columns] for summary in found])
    for summary in found:
        if summary.error:
            out.warn(f"{summary.error} (flashrl presets show {summary.name})")


@presets.command("show", epilog="flashrl presets show dapo-32b --tis 8 --set data.max_response_length=8192")
def show(
    preset: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset's name, or a YAML file.")],
    rollout: Rollout = None,
    tis: Tis = None,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Show every value of a preset and where it comes from."""
    from flashrl_cli.config.merge import leaves
    from flashrl_cli.config.resolve import load_spec
    from flashrl_cli.render.output import Output

    out = Output(json_mode=json)
    resolved = load_spec(preset, rollout=rollout, tis=tis, sets=sets or ())
    values = dict(leaves(resolved.spec.model_dump(mode="json")))
    origins = {key: str(origin) for key, origin in resolved.origins.items()}
    if json:
        name = resolved.spec.name
        out.document({"schema_version": SCHEMA_VERSION, "preset": name, "values": values, "origins": origins})
        return
    out.table(("key", "value", "origin"), [[key, str(value), origins[key]] for key, value in values.items()])

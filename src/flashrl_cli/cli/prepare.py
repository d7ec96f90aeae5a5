"""`flashrl prepare`: data sets as verl reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli.cli.options import Json

if TYPE_CHECKING:
    from flashrl_cli.render.output import Output


def _complete(incomplete: str) -> list[str]:
    from flashrl_cli.data.recipes import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


def prepare(
    datasets: Annotated[
        list[str],
        typer.Argument(
            metavar="DATASET...",
            help="gsm8k, math, math-500, dapo-math-17k, aime-2024, aime-2025, arith, tiny.",
            autocompletion=_complete,
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB_ID", help="File (jsonl, json, parquet), folder of them, or hub id to read from."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder to write to (default: $FLASHRL_DATA/DATASET, else ~/data/DATASET)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Keep the first N rows of each split.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH|HUB_ID", help="Count prompt tokens with this model's tokenizer.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of arith and tiny (default: 0).")] = None,
    dedupe: Annotated[
        bool, typer.Option("--dedupe/--no-dedupe", help="Drop repeated prompts of dapo-math-17k and aime-2024.")
    ] = True,
    offline: Annotated[bool, typer.Option("--offline", help="Use the hub's cache only, never the network.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Prepare again even if up to date.")] = False,
    json: Json = False,
) -> None:
    """Prepare data sets as verl reads them.

    train.parquet, test.parquet and a manifest of what they were made from.

    flashrl prepare gsm8k

    flashrl prepare gsm8k --source downloads/gsm8k --tokenizer Qwen/Qwen2.5-0.5B-Instruct
    """
    from flashrl_cli import signals
    from flashrl_cli.data.prepare import prepare_dataset, requests
    from flashrl_cli.render.output import Output

    output = Output(json_mode=json)
    signals.say_if_ignored(output.say)
    wanted = requests(
        datasets,
        source=source,
        out=out,
        limit=limit,
        tokenizer=tokenizer,
        seed=seed,
        dedupe=dedupe,
        offline=offline,
        force=force,
    )
    _show([prepare_dataset(request, output) for request in wanted], output)


def _show(results: list[dict[str, Any]], output: Output) -> None:
    if output.json_mode:
        output.document({"schema_version": 1, "datasets": results})
        return
    from flashrl_cli.data.prepare import summary_table

    output.table(*summary_table(results))

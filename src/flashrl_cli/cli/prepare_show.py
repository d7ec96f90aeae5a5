"""`flashrl prepare show`: read the rows of a data set."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli.cli.options import NAME_OR_FILE, Json, preset_names

if TYPE_CHECKING:
    from flashrl_cli.render.output import Output

SCHEMA_VERSION = 1
_WIDEST = 100


def show(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="A prepared data set, or a file of rows (parquet, json, jsonl).")
    ],
    *,
    n: Annotated[int, typer.Option("--n", min=0, help="Rows to show.")] = 3,
    split: Annotated[
        str | None, typer.Option(metavar="train|test", help="Split to show rows of.", show_default="the first")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH|HUB_ID", help="Apply this model's chat template, and count its tokens."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar=NAME_OR_FILE, help="Take model and longest prompt from a preset.", autocompletion=preset_names
        ),
    ] = None,
    max_prompt_length: Annotated[
        int | None, typer.Option(min=1, help="Count prompts that have more tokens.", show_default="the preset's")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Do not leave out the middle of long texts.")] = False,
    json: Json = False,
) -> None:
    """Show rows of a data set as the model sees them.

    And how long the prompts are: the median, the 95th and 99th percentile, the longest.

    flashrl prepare show mydata

    flashrl prepare show mydata --preset gsm8k-grpo-0.5b
    """
    from flashrl_cli.data.show import Model, look
    from flashrl_cli.render.output import Output

    output = Output(json_mode=json)
    model = Model.chosen(preset, tokenizer, max_prompt_length)
    seen = look(dataset, split=split, count=n, model=model, output=output)
    if json:
        output.document({"schema_version": SCHEMA_VERSION, **seen})
    else:
        _print(output, seen, full=full)


def _print(output: Output, seen: dict[str, Any], *, full: bool) -> None:
    from flashrl_cli.data.show import split_table
    from flashrl_cli.render.examples import row_lines

    output.table(*split_table(seen))
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    for row in seen["examples"]:
        for line in row_lines(row, width=width, full=full):
            output.text(line)
        output.text("")
    cut = sum(split["cut"] or 0 for split in seen["splits"])
    if cut:
        output.warn(
            f"{cut:,} prompts have more than {seen['max_prompt_length']:,} tokens, and lose their beginning in "
            "training: --set data.max_prompt_length=…, or --set data.filter_overlong=true leaves them out"
        )

"""`flashrl prepare`: data sets as verl reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli.cli.options import Json
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from flashrl_cli.render.output import Output


def _complete(incomplete: str) -> list[str]:
    from flashrl_cli.data.recipes import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


def prepare(
    datasets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATASET...",
            help="gsm8k, math, math-500, dapo-math-17k, aime-2024, aime-2025, arith, tiny; rg:TASK; or your own name.",
            autocompletion=_complete,
        ),
    ] = None,
    *,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB_ID", help="File (jsonl, json, parquet, csv), folder of them, or hub id to read from."
        ),
    ] = None,
    map: Annotated[  # noqa: A002
        str | None,
        typer.Option(
            metavar="prompt=COLUMN,answer=COLUMN",
            help="Columns of your questions and answers.",
            show_default="prompt, answer",
        ),
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|FILE",
            help="Words around {prompt}, and any column in braces.",
            show_default="what the reward's answers need",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message of every prompt.")] = None,
    answer_regex: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Its group, in its last match in the answer's column, is the answer."),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.py:FUNCTION",
            help="gsm8k (#### 72), math (\\boxed{72}), dapo (Answer: 72), exact (72), or a function of yours.",
            show_default="math",
        ),
    ] = None,
    split: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Share of your rows to train on; the others are the test split.", show_default="0.95"
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Rows to generate of rg:TASK,… together (reasoning-gym).", show_default="1000"
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML file with these values, instead of options.")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only write such a file, from a look at the source's first rows."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder to write to (default: $FLASHRL_DATA/DATASET, else ~/data/DATASET)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Keep the first N rows of each split.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH|HUB_ID", help="Count prompt tokens with this model's tokenizer.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of arith, tiny, rg: and --split (default: 0).")
    ] = None,
    dedupe: Annotated[
        bool,
        typer.Option(
            "--dedupe/--no-dedupe", help="Drop repeated prompts of dapo-math-17k, of aime-2024 and of your rows."
        ),
    ] = True,
    offline: Annotated[bool, typer.Option("--offline", help="Use the hub's cache only, never the network.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Prepare again even if up to date.")] = False,
    json: Json = False,
) -> None:
    """Prepare data sets as verl reads them.

    train.parquet, test.parquet and a manifest of what they were made from. `flashrl prepare show DATASET` reads them.

    flashrl prepare gsm8k

    flashrl prepare gsm8k --source downloads/gsm8k --tokenizer Qwen/Qwen2.5-0.5B-Instruct

    flashrl prepare mydata --source questions.csv --map prompt=question,answer=solution --reward math

    flashrl prepare rg:chain_sum,gsm_symbolic --rows 5000 --seed 1
    """
    from flashrl_cli import signals
    from flashrl_cli.data.prepare import init_recipe, prepare_dataset, requests
    from flashrl_cli.render.output import Output

    output = Output(json_mode=json)
    signals.say_if_ignored(output.say)
    words = {
        "map": map,
        "prompt_template": prompt_template,
        "system": system,
        "answer_regex": answer_regex,
        "reward": reward,
        "split": split,
        "rows": rows,
    }
    if init is not None:
        written = init_recipe(init, source=source, words=words)
        if json:
            output.document({"schema_version": 1, "recipe": written, "path": str(init)})
        output.say(f"wrote {init}; `flashrl prepare NAME --recipe {init}` prepares it")
        return
    if not datasets and recipe is None:
        raise InputError("no data set is named", hint="flashrl prepare gsm8k; `flashrl prepare --help` lists them")
    wanted = requests(
        datasets or (),
        source=source,
        recipe=recipe,
        words=words,
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

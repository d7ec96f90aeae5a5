"""`flashrl eval`: the accuracy of checkpoints, with its interval, by one engine."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashrl_cli.cli.options import Json

if TYPE_CHECKING:
    from flashrl_cli.evals.request import Request
    from flashrl_cli.render.output import Output
    from flashrl_cli.runs.checkpoints import Skipped


class Rollout(enum.StrEnum):
    """Precision of the linear layers while responses are generated."""

    bf16 = "bf16"
    int8 = "int8"


def evaluate(
    patterns: Annotated[
        list[str],
        typer.Argument(metavar="PATTERN...", help="Globs or paths: projects, runs, global_step_N, or HF folders."),
    ],
    *,
    base: Annotated[
        str | None, typer.Option(metavar="PATH", help="HF folder of the policy that training began with: step 0.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PARQUET", help="Prepared data set (its test split) or file.", show_default="the run's own"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Responses to each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Share of probability to sample from.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 512,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Longest prompt and response together.", show_default="what the prompts need"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    rollout: Annotated[Rollout, typer.Option(help="int8 shows what an INT8 rollout saw.")] = Rollout.bf16,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results go.", show_default="eval/ in the run's checkpoints"),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Also draw the curve to eval.png.")] = False,
    json: Json = False,
) -> None:
    """Evaluate checkpoints: accuracy by step, with intervals.

    A table with 95 % intervals, and CSV and JSON beside the checkpoints.

    flashrl eval "checkpoints/*"

    flashrl eval checkpoints/flashrl/tiny --base ~/data/tiny/model --png
    """
    from flashrl_cli.evals.job import Sampling
    from flashrl_cli.evals.request import plan

    request = plan(
        patterns,
        base=base,
        data=data,
        limit=limit,
        sampling=Sampling(n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed),
        rollout=rollout.value,
        max_model_len=max_model_len,
        out=out,
    )
    _run(request, json=json, png=png)


def _run(request: Request, *, json: bool, png: bool) -> None:
    from flashrl_cli.evals import run
    from flashrl_cli.evals.report import Report
    from flashrl_cli.render import plots
    from flashrl_cli.render.output import Output

    if png:
        plots.require("matplotlib")
    output = Output(json_mode=json)
    _warn(output, request.skipped)
    label = f"evaluating {len(request.checkpoints)} checkpoints × {len(request.questions)} prompts"
    with output.progress(label, request.prompts) as advance:
        outcome = run.evaluate(request, say=output.say, advance=advance)
    _warn(output, outcome.skipped)
    report = Report.of(request, outcome)
    report.write(request.folder)
    curves = [plots.Series(**curve) for curve in report.curves()]
    if png and curves:
        plots.write_png(curves, request.folder / "eval.png", ylabel="accuracy")
    elif png:
        output.warn("no eval.png: a curve needs two steps of a run")
    if json:
        output.document(report.document())
        return
    output.table(*report.table())
    if curves and plots.installed("plotext"):
        output.text(plots.text_curve(curves, ylabel="accuracy, 95 % interval"))
    output.say(f"written to {request.folder}")


def _warn(output: Output, skipped: Iterable[Skipped]) -> None:
    for one in skipped:
        output.warn(f"skipped {one.path}: {one.reason}")

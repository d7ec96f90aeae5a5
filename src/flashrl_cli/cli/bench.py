"""`flashrl bench`: speed, weight updates and mismatch of rollouts in each precision on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli.cli.options import Json, KvMemory, MemoryShare, TensorParallel
from flashrl_cli.precision import PRECISIONS, joined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.bench.report import Report
    from flashrl_cli.bench.request import Request
    from flashrl_cli.bench.run import Measured
    from flashrl_cli.render.output import Output


def bench(
    *,
    model: Annotated[
        str,
        typer.Option(
            metavar="PATH|HUB_ID|prepared:NAME|shape:SIZE",
            help="A model, or only the shape of Qwen2.5 with random weights: shape:7b, its first layers: shape:7b/4.",
        ),
    ] = "prepared:tiny",
    rollout: Annotated[
        str,
        typer.Option(
            "--rollout",
            metavar="KIND,...",
            help=(
                f"{joined(PRECISIONS, 'or')}, each with any of +kv8 or +kvint8 (FP8 or INT8 KV cache), "
                "+head32 (float32 logits), +smooth; int8 with +plain (no rotation) or +rot16 to +rot128."
            ),
        ),
    ] = "bf16,int8",
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="N|fit,...",
            help="Sequences at once; fit: as many as the KV cache holds.",
            show_default="64,256; on a CPU 4,16",
        ),
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each random prompt.", show_default="512; on a CPU 64")
    ] = None,
    response: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each response.", show_default="512; on a CPU 32")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each speed; the median counts.")] = 3,
    refit: Annotated[bool, typer.Option("--refit", help="Also time the update of all weights.")] = False,
    mismatch: Annotated[
        bool, typer.Option("--mismatch", help="Also compare log-probs with the trainer's (Transformers); needs --data.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME|PARQUET,...", help="Prompts for --mismatch: prepared data sets or parquet files."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Responses to compare.", show_default="256; on a CPU 64")
    ] = None,
    trainer_dtype: Annotated[
        str, typer.Option(metavar="bfloat16|float32", help="What the trainer computes in.")
    ] = "bfloat16",
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help="Smoothing profile for +smooth.")] = None,
    tensor_parallel: TensorParallel = 1,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences that the engine computes at once.", show_default="the largest batch"),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Longest prompt and response together.", show_default="what is measured needs"),
    ] = None,
    gpu_memory_utilization: MemoryShare = None,
    kv_memory: KvMemory = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1, help="Leave out what does not fit into this time.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir", metavar="DIR", help="Where finished points are kept.", show_default=".bench in the runs folder"
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is kept.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Also write the JSON document to a file.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw the speeds, with --mismatch over the KL.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure kinds of rollouts: speed, refits, mismatch.

    Output tokens a second, prefill included; seconds of a weight update; log-probs against the trainer's. Goes on where
    it was.

    flashrl bench --model shape:7b --rollout bf16,int8,fp8 --refit

    flashrl bench --rollout bf16,int8,int8+kv8 --mismatch --data tiny
    """
    asked = dict(locals())  # all but these three are fields of request.Asked, by the same names
    _bench(asked.pop("json"), {"--out": asked.pop("out"), "--png": asked.pop("png")}, asked)


def _bench(json_mode: bool, written: dict[str, Path | None], options: dict[str, Any]) -> None:
    """Measure what the `options` request; the document and the figure are written to the files in `written`."""
    from flashrl_cli import files, paths, signals
    from flashrl_cli.bench.request import Asked, plan
    from flashrl_cli.render import figure
    from flashrl_cli.render.output import Output

    output = Output(json_mode=json_mode)
    out, png = (paths.absolute(file) if file else None for file in written.values())
    for option, file in zip(written, (out, png), strict=True):
        _check_place(option, file)
    if png:
        figure.require("matplotlib")
    asked = Asked(**options)
    with signals.raised("the same command goes on from here", output.say):
        request = plan(asked)
        with files.alone(request.folder, lambda: _say_waiting(output, request.folder)) as waited:
            # the free memory and GPU can only be determined once the other benchmark has ended
            report = _measured(output, plan(asked) if waited else request, out)
        if png:
            _draw(output, report, png)
        _show(output, report)


def _say_waiting(output: Output, folder: Path) -> None:
    output.say(
        f"another benchmark works in {folder}: waiting for it, as two at once would measure each other; "
        "--dir DIR works beside it, on other GPUs"
    )


def _check_place(option: str, file: Path | None) -> None:
    """Raise InputError for a file that cannot be written, before hours are spent on its content."""
    from flashrl_cli import paths
    from flashrl_cli.errors import InputError

    if file is None:
        return
    if file.is_dir():
        raise InputError(f"{option} {file} is a folder", hint=f"{option} {file}/FILE")
    above = paths.existing(file.parent)
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise InputError(f"{option} {file}: {above} cannot be written to", hint=f"{option} FILE elsewhere")


def _measured(output: Output, request: Request, out: Path | None) -> Report:
    """The finished report; it is saved to `out` after every point, so that an interruption loses little."""
    from flashrl_cli import files
    from flashrl_cli.bench import run
    from flashrl_cli.bench.report import Report

    def report(measured: Sequence[Measured]) -> Report:
        return Report(request, measured, ["flashrl", *sys.argv[1:]])

    def write(measured: Sequence[Measured]) -> None:
        if out:
            files.write_json(out, report(measured).document())

    if request.defaults:
        output.say(f"on {request.machine.device} by default: {', '.join(request.defaults)}")
    names = ", ".join(one.name for one in request.variants)
    with output.progress(f"measuring {names}", run.count(request)) as advance:
        session = run.Session(request, run.Progress(say=output.say, advance=advance, finished=write))
        session.work()
    write(session.measured)
    if out:
        output.say(f"written to {out}")
    return report(session.measured)


def _draw(output: Output, report: Report, png: Path) -> None:
    from flashrl_cli.render import figure

    if any(report.speeds.values()):
        asked = report.request
        lengths = f"{asked.prompt:,}-token prompts, {asked.response:,} new tokens"
        about = f"{asked.model.name}, {lengths}, {asked.machine.device}"
        if fronts := report.fronts:
            figure.write_fronts_png({one.title: one.document() for one in fronts}, png, about=about)
        else:
            figure.write_bars_png(report.speeds, png, about=about)
        output.say(f"drawn to {png}")
    else:
        output.warn(f"no {png}: no speed was measured")


def _show(output: Output, report: Report) -> None:
    """Print the result; raises RunFailed if a variant failed."""
    from flashrl_cli.bench.report import TIMES
    from flashrl_cli.errors import Problem, RunFailed

    if output.json_mode:
        output.document(report.document())
    else:
        output.wide_table(*report.table(), joined=TIMES)
        for sentence in report.sentences():
            output.text(sentence)
    if failed := report.failed:
        problems = [Problem(one.failure.message, one.variant.name, one.failure.hint) for one in failed if one.failure]
        what = f"{len(failed)} of {len(report.measured)} variants could not be measured in full"
        raise RunFailed(what, problems=problems)

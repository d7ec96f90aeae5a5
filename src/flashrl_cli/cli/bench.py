"""`flashrl bench`: what each kind of rollout costs and gives on this machine.

Options of `flashrl bench`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli.cli.options import Json, MemoryShare, TensorParallel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.bench.job import Measured
    from flashrl_cli.bench.report import Report
    from flashrl_cli.bench.request import Request
    from flashrl_cli.render.output import Output

MACHINE = "the machine's"

Model = Annotated[
    str,
    typer.Option(
        metavar="PATH|HUB_ID|prepared:NAME|shape:SIZE",
        help="A model, or only the shape of Qwen2.5 with random weights: shape:7b, its first layers: shape:7b/4.",
    ),
]
Rollouts = Annotated[
    str,
    typer.Option(
        "--rollout",
        metavar="KIND,...",
        help="bf16, int8, fp8 or fp8-block, each with any of +kv8 (FP8 KV cache), +head32 (float32 logits), +smooth.",
    ),
]
Batch = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="N|fit,...",
        help="Sequences at once; fit: as many as the KV cache holds.",
        show_default="64,256; on a CPU 4,16",
    ),
]
Prompt = Annotated[
    int | None, typer.Option(min=1, help="Tokens of each random prompt.", show_default="512; on a CPU 64")
]
Response = Annotated[int | None, typer.Option(min=1, help="Tokens of each response.", show_default="512; on a CPU 32")]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements of each speed; the median counts.")]
Refit = Annotated[bool, typer.Option("--refit", help="Also time the update of all weights.")]
Mismatch = Annotated[
    bool, typer.Option("--mismatch", help="Also compare log-probs with the trainer's (Transformers); needs --data.")
]
Data = Annotated[
    str | None,
    typer.Option(metavar="NAME|PARQUET,...", help="Prompts for --mismatch: prepared data sets or parquet files."),
]
Samples = Annotated[int | None, typer.Option(min=1, help="Responses to compare.", show_default="256; on a CPU 64")]
TrainerDtype = Annotated[str, typer.Option(metavar="bfloat16|float32", help="What the trainer computes in.")]
Profile = Annotated[Path | None, typer.Option(metavar="FILE", help="Smoothing profile for +smooth.")]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(min=1, help="Sequences that the engine computes at once.", show_default="the largest batch"),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(min=2, help="Longest prompt and response together.", show_default="what is measured needs"),
]
KvMemory = Annotated[
    float | None,
    typer.Option(
        "--kv-memory", metavar="GIB", min=0.1, help="KV cache of each GPU.", show_default="what is left; on a CPU 1"
    ),
]
Eager = Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")]
Budget = Annotated[
    float | None, typer.Option(metavar="SECONDS", min=1, help="Leave out what does not fit into this time.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--dir", metavar="DIR", help="Where finished points are kept.", show_default=".bench in the runs folder"
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what is kept.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Also write the JSON document to a file.")]
Png = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw the speeds.")]


def bench(
    *,
    model: Model = "prepared:tiny",
    rollout: Rollouts = "bf16,int8",
    batch: Batch = None,
    prompt: Prompt = None,
    response: Response = None,
    repeats: Repeats = 3,
    refit: Refit = False,
    mismatch: Mismatch = False,
    data: Data = None,
    samples: Samples = None,
    trainer_dtype: TrainerDtype = "bfloat16",
    profile: Profile = None,
    tp: TensorParallel = 1,
    max_num_seqs: MaxNumSeqs = None,
    max_model_len: MaxModelLen = None,
    gpu_memory_utilization: MemoryShare = None,
    kv_memory: KvMemory = None,
    enforce_eager: Eager = False,
    budget: Budget = None,
    folder: Folder = None,
    fresh: Fresh = False,
    out: Out = None,
    png: Png = None,
    json: Json = False,
) -> None:
    """Measure kinds of rollouts: speed, refits, mismatch.

    Output tokens a second, prefill included; seconds of a weight update; log-probs against the trainer's. Goes on where it was.

    flashrl bench --model shape:7b --rollout bf16,int8,fp8 --refit

    flashrl bench --rollout bf16,int8,int8+kv8 --mismatch --data tiny
    """
    _bench(
        json,
        (out, png),
        model=model,
        rollout=rollout,
        batch=batch,
        prompt=prompt,
        response=response,
        repeats=repeats,
        refit=refit,
        mismatch=mismatch,
        data=data,
        samples=samples,
        trainer_dtype=trainer_dtype,
        profile=profile,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        kv_memory=kv_memory,
        budget=budget,
        folder=folder,
        fresh=fresh,
        tensor_parallel=tp,
    )


def _bench(json_mode: bool, written: tuple[Path | None, Path | None], **asked: Any) -> None:
    """Measure what was `asked` (request.Asked), and write the document and the figure where they are `written` to."""
    from flashrl_cli import files, paths
    from flashrl_cli.bench.request import Asked, plan
    from flashrl_cli.render import figure
    from flashrl_cli.render.output import Output
    from flashrl_cli.train import process

    output = Output(json_mode=json_mode)
    out, png = (paths.absolute(file) if file else None for file in written)
    for option, file in (("--out", out), ("--png", png)):
        _check_place(option, file)
    if png:
        figure.require("matplotlib")
    with process.raised("the same command goes on from here", output.say):
        request = plan(Asked(**asked))
        with files.alone(request.folder, lambda: _say_waiting(output, request.folder)) as waited:
            # what memory is free, and on which GPU, is another answer once the other one has ended
            report = _measured(output, plan(Asked(**asked)) if waited else request, out)
        if png:
            _draw(output, report, png)
        _show(output, report)


def _say_waiting(output: Output, folder: Path) -> None:
    output.say(
        f"another benchmark works in {folder}: waiting for it, as two at once would measure each other; "
        "--dir DIR works beside it, on other GPUs"
    )


def _check_place(option: str, file: Path | None) -> None:
    """Raise InputError for a file that cannot be written, before hours are spent on what stands in it."""
    from flashrl_cli.errors import InputError
    from flashrl_cli.machine import system

    if file is None:
        return
    if file.is_dir():
        raise InputError(f"{option} {file} is a folder", hint=f"{option} {file}/FILE")
    above = system.existing(file.parent)
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise InputError(f"{option} {file}: {above} cannot be written to", hint=f"{option} FILE elsewhere")


def _measured(output: Output, request: Request, out: Path | None) -> Report:
    """The finished report; `out` has it after every point, so that an interruption leaves what there is."""
    from flashrl_cli import files
    from flashrl_cli.bench import job
    from flashrl_cli.bench.report import Report
    from flashrl_cli.bench.run import Session, Telling

    def report(measured: Sequence[Measured]) -> Report:
        return Report(request, measured, ["flashrl", *sys.argv[1:]])

    def write(measured: Sequence[Measured]) -> None:
        if out:
            files.write_json(out, report(measured).document())

    if request.defaults:
        output.say(f"on {request.machine.device} by default: {', '.join(request.defaults)}")
    names = ", ".join(one.name for one in request.variants)
    with output.progress(f"measuring {names}", job.count(request)) as advance:
        session = Session(request, Telling(say=output.say, advance=advance, finished=write))
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
        figure.write_bars_png(report.speeds, png, about=f"{asked.model.name}, {lengths}, {asked.machine.device}")
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
        what = f"{len(failed)} of {len(report.measured)} kinds of rollouts could not be measured in full"
        raise RunFailed(what, problems=problems)

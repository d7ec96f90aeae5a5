"""`flashrl bench`: what each kind of rollout costs and gives on this machine."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from flashrl_cli.cli import bench_options as options
from flashrl_cli.cli.options import Json, MemoryShare, TensorParallel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flashrl_cli.bench.report import Report
    from flashrl_cli.bench.request import Request
    from flashrl_cli.bench.results import Measured
    from flashrl_cli.render.output import Output


def bench(
    *,
    model: options.Model = "prepared:tiny",
    rollout: options.Rollouts = "bf16,int8",
    batch: options.Batch = None,
    prompt: options.Prompt = None,
    response: options.Response = None,
    repeats: options.Repeats = 3,
    refit: options.Refit = False,
    mismatch: options.Mismatch = False,
    data: options.Data = None,
    samples: options.Samples = None,
    trainer_dtype: options.TrainerDtype = "bfloat16",
    profile: options.Profile = None,
    tp: TensorParallel = 1,
    max_num_seqs: options.MaxNumSeqs = None,
    max_model_len: options.MaxModelLen = None,
    gpu_memory_utilization: MemoryShare = None,
    kv_memory: options.KvMemory = None,
    enforce_eager: options.Eager = False,
    budget: options.Budget = None,
    folder: options.Folder = None,
    fresh: options.Fresh = False,
    out: options.Out = None,
    png: options.Png = None,
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
    from flashrl_cli.launch import signals
    from flashrl_cli.render import plots
    from flashrl_cli.render.output import Output

    output = Output(json_mode=json_mode)
    out, png = (paths.absolute(file) if file else None for file in written)
    for option, file in (("--out", out), ("--png", png)):
        _check_place(option, file)
    if png:
        plots.require("matplotlib")
    with signals.raised("the same command goes on from here", output.say):
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
    from flashrl_cli.doctor import system
    from flashrl_cli.errors import InputError

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
    from flashrl_cli.bench import points
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
    with output.progress(f"measuring {names}", points.count(request)) as advance:
        session = Session(request, Telling(say=output.say, advance=advance, finished=write))
        session.work()
    write(session.measured)
    if out:
        output.say(f"written to {out}")
    return report(session.measured)


def _draw(output: Output, report: Report, png: Path) -> None:
    from flashrl_cli.render import bars

    if any(report.speeds.values()):
        asked = report.request
        lengths = f"{asked.prompt:,}-token prompts, {asked.response:,} new tokens"
        bars.write_png(report.speeds, png, about=f"{asked.model.name}, {lengths}, {asked.machine.device}")
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

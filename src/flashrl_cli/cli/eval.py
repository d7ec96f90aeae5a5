"""`flashrl eval`: the accuracy of checkpoints, with its interval, by one engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import paths
from flashrl_cli.cli import eval_options as options
from flashrl_cli.cli.options import Json, MemoryShare, TensorParallel
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.evals.job import EngineSettings
    from flashrl_cli.evals.report import Report
    from flashrl_cli.evals.request import Request
    from flashrl_cli.evals.run import Telling
    from flashrl_cli.evals.session import Finished
    from flashrl_cli.render.output import Output


def evaluate(
    patterns: options.Patterns,
    *,
    base: options.Base = None,
    baseline: options.Baseline = None,
    dataset: options.Datasets = None,
    limit: options.Limit = None,
    n: options.Samples = 1,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    max_tokens: options.MaxTokens = 512,
    max_model_len: options.MaxModelLen = None,
    seed: options.Seed = 0,
    rollout: options.Precision = options.Rollout.bf16,
    profile: options.Profile = None,
    tp: TensorParallel = 1,
    gpu_memory_utilization: MemoryShare = None,
    fail_under: options.FailUnder = None,
    watch: options.Watch = False,
    merge: options.Merge = None,
    out: options.Out = None,
    png: options.Png = False,
    json: Json = False,
) -> None:
    """Evaluate checkpoints: accuracy by step, with intervals.

    A table with 95 % intervals, what of it is more than chance, and CSV, JSON and every response beside the checkpoints.
    What was evaluated before is not generated again. `flashrl eval show` reads the responses.

    flashrl eval "checkpoints/*"

    flashrl eval checkpoints/flashrl/tiny --base ~/data/tiny/model --png
    """
    from flashrl_cli.evals import job, request, verdicts
    from flashrl_cli.launch import signals
    from flashrl_cli.render.output import Output

    output = Output(json_mode=json)
    least = verdicts.share("--fail-under", fail_under)
    with signals.raised("the same command goes on from here", output.say):
        if merge is not None:
            _merge(output, patterns, merge, least)
            return
        lookup = partial(
            request.plan,
            patterns,
            base=base,
            baseline=baseline,
            dataset=dataset,
            limit=limit,
            sampling=job.Sampling(n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed),
            engine=_engine(rollout, max_model_len, gpu_memory_utilization, tp, profile),
            out=out,
            fail_under=least,
        )
        _evaluate(output, lookup, patterns, watch=watch, png=png)


def _engine(
    rollout: options.Rollout, max_model_len: int | None, memory: float | None, tp: int, profile: Path | None
) -> EngineSettings:
    from flashrl_cli.evals.job import EngineSettings

    return EngineSettings(
        rollout=rollout.value,
        max_model_len=max_model_len,
        gpu_memory_utilization=memory,
        tensor_parallel=tp,
        profile=None if profile is None else str(paths.absolute(profile)),
    )


def _evaluate(output: Output, lookup: Callable[[], Request], patterns: list[str], *, watch: bool, png: bool) -> None:
    from flashrl_cli.evals import session
    from flashrl_cli.render import plots

    if png:
        plots.require("matplotlib")
    if watch:
        with _telling(output, "evaluating what is saved", None) as telling:
            finished = session.watch(lookup, patterns, telling, partial(_show_newest, output))
    else:
        request = lookup()
        sets = ", ".join(f"{one.name} ({len(one.questions):,})" for one in request.data)
        label = f"evaluating {counted(len(request.checkpoints), 'checkpoint')} on {sets}"
        with _telling(output, label, request.prompts) as telling:
            finished = session.evaluate(request, telling)
    _show(output, finished, watch=watch, png=png)
    if finished.report.threshold:
        finished.report.threshold.require()
    finished.report.require_all()


@contextlib.contextmanager
def _telling(output: Output, label: str, prompts: int | None) -> Iterator[Telling]:
    from flashrl_cli.evals.run import Speed, Telling

    with output.progress(label, prompts) as advance:
        speed = Speed()
        yield Telling(say=output.say, advance=lambda n, tokens: advance(n, speed.after(tokens)))


def _show_newest(output: Output, report: Report) -> None:
    """One look's result while others are still to come."""
    if output.json_mode:
        output.json_line(report.document())
    else:
        output.table(*report.table())


def _show(output: Output, finished: Finished, *, watch: bool, png: bool) -> None:
    from flashrl_cli.render import plots

    report, folder = finished.report, finished.folder
    curves = [plots.Series(**curve) for curve in report.curves()]
    if png and curves:
        plots.write_png(curves, folder / "eval.png", ylabel="accuracy")
    elif png:
        output.warn("no eval.png: a curve needs two steps of a run")
    if output.json_mode:
        (output.json_line if watch else output.document)(report.document())
        return
    output.table(*report.table())
    for sentence in report.verdicts:
        output.text(sentence)
    if curves and plots.installed("plotext"):
        output.text(plots.text_curve(curves, ylabel="accuracy, 95 % interval"))
    output.say(f"written to {folder}; `flashrl eval show {folder}` reads the responses")


def _merge(output: Output, patterns: list[str], target: Path, least: float | None) -> None:
    from flashrl_cli import files
    from flashrl_cli.errors import InputError
    from flashrl_cli.evals.merge import merged
    from flashrl_cli.runs.checkpoints import find

    if least is not None:
        raise InputError("--fail-under is for an evaluation, and --merge evaluates nothing", hint="two commands")
    found = find(patterns)
    for one in found.skipped:
        output.warn(f"skipped {one.path}: {one.reason}")
    place, count = paths.absolute(target), len(found.checkpoints)
    with (
        files.alone(place, lambda: output.say(f"another command writes to {place}: waiting for it")),
        output.progress(f"merging {counted(count, 'checkpoint')}", count) as advance,
    ):
        folders = merged(found.checkpoints, place, advance, output.warn)
    if output.json_mode:
        output.document({"schema_version": 1, "merged": [str(folder) for folder in folders]})
        return
    for folder in folders:
        output.text(str(folder))

"""`flashrl eval`: the accuracy of checkpoints, with its interval, by one engine."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from json import loads as parse_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli import paths
from flashrl_cli.cli.options import Json, KvMemory, MemoryShare, TensorParallel
from flashrl_cli.errors import InputError
from flashrl_cli.precision import BLOCKS, BY_METHOD, ROTATED, SMOOTHED, RefittedName, joined
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.evals.accuracy import Report
    from flashrl_cli.evals.evaluation import Finished, Progress, Request
    from flashrl_cli.render.output import Output

MODEL = "PATH|HUB_ID"


def evaluate(
    patterns: Annotated[
        list[str],
        typer.Argument(
            metavar="PATTERN...", help="Globs or paths: projects, runs, global_step_N, HF folders, adapters; hub ids."
        ),
    ],
    *,
    base: Annotated[
        str | None, typer.Option(metavar=MODEL, help="The policy that training began with: step 0 of every run.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar=MODEL, help="Any model that the best step is compared with.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PARQUET,...",
            help="Prepared data sets (their test split) or files.",
            show_default="the run's own",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="Reward function of your own to grade with.",
            show_default="the run's own on its data, else verl's",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="A response is right if a reward function of your own gives it more.",
            show_default="the run's own, else 0.5",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts of each data set.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Responses to each prompt; several add pass@k and maj@n.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Share of probability to sample from.")] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Number of most likely tokens to sample from.", show_default="all")
    ] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 512,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End a response before this text (\\n is a line break); repeatable."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="System message, instead of the rows' own; an empty one removes it."),
    ] = None,
    shots: Annotated[
        int, typer.Option(min=0, metavar="N", help="Solved examples before each question, from the train split.")
    ] = 0,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="none|FILE",
            help="None, for models that have no chat template, or a Jinja template.",
            show_default="each model's own",
        ),
    ] = None,
    template_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Variable of the chat template: enable_thinking=false; repeatable."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Longest prompt and response together.", show_default="what the prompts need"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling, and of the choice of examples.")] = 0,
    rollout: Annotated[
        RefittedName, typer.Option(help=f"{joined(BY_METHOD, 'and')} show what such a rollout saw.")
    ] = "bf16",
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f"Smoothing profile to apply, as a rollout with it does ({', '.join(SMOOTHED)})."
        ),
    ] = None,
    rotation: Annotated[
        str,
        typer.Option(metavar=f"auto|{'|'.join(map(str, BLOCKS))}|off", help="Rotation of int8's inputs, by blocks."),
    ] = "auto",
    tp: TensorParallel = 1,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="all|N",
            help="GPUs to use: an engine on each (on --tp of them), which share the work.",
            show_default="one engine",
        ),
    ] = None,
    gpu_memory_utilization: MemoryShare = None,
    kv_memory: KvMemory = None,
    fail_under: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE", help="Exit with 5 if the newest step of a run, or a model, is less accurate (0 to 1)."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Evaluate each new checkpoint of a running training, until it ends.")
    ] = False,
    merge: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Only write the weights as HF folders to DIR; evaluate nothing."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results go.", show_default="eval/ in the run's checkpoints"),
    ] = None,
    png: Annotated[
        bool, typer.Option("--png", help="Also draw curves to eval.png, several models to leaderboard.png.")
    ] = False,
    html: Annotated[
        bool, typer.Option("--html", help="Also a page that ranks several models, leaderboard.html.")
    ] = False,
    json: Json = False,
) -> None:
    """Evaluate checkpoints: accuracy by step, with intervals.

    A table with 95 % intervals, what of it is more than chance, and CSV, JSON and every response beside the
    checkpoints. What was evaluated before is not generated again. `flashrl eval show` reads the responses.

    flashrl eval "checkpoints/*"

    flashrl eval checkpoints/flashrl/tiny --base ~/data/tiny/model --png
    """
    from flashrl_cli import signals
    from flashrl_cli.evals import verdicts
    from flashrl_cli.evals.evaluation import Request
    from flashrl_cli.evals.job import EngineSettings, Sampling
    from flashrl_cli.evals.questions import Prompting
    from flashrl_cli.render.output import Output

    output = Output(json_mode=json)
    least = verdicts.share("--fail-under", fail_under)
    with signals.raised("the same command goes on from here", output.say):
        if merge is not None:
            _merge(output, patterns, merge, least)
            return
        lookup = partial(
            Request.find,
            patterns,
            base=base,
            baseline=baseline,
            dataset=dataset,
            limit=limit,
            sampling=Sampling(
                n=n,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                max_tokens=max_tokens,
                stop=_stop(stop or ()),
                seed=seed,
            ),
            prompting=Prompting(
                system=system,
                shots=shots,
                chat_template=_template(chat_template),
                arguments=_arguments(template_arg or ()),
            ),
            engine=EngineSettings(
                rollout=rollout,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_memory=kv_memory,
                tensor_parallel=tp,
                profile=None if profile is None else str(paths.absolute(profile)),
                rotation=_rotation(rotation, rollout),
            ),
            out=out,
            engines=_engines(gpus, tp),
            reward=reward,
            threshold=threshold,
            fail_under=least,
        )
        _evaluate(output, lookup, patterns, watch=watch, png=png, html=html)


def _stop(texts: Sequence[str]) -> tuple[str, ...]:
    r"""The texts of `--stop`, in which `\n`, `\t` and `\\` are a line break, a tab and a backslash.

    Raises InputError for an empty one.
    """
    if "" in texts:
        raise InputError("--stop: an empty text would end every response", hint=r"--stop '\n\n'")
    written = {r"\n": "\n", r"\t": "\t", "\\\\": "\\"}
    return tuple(re.sub(r"\\[nt\\]", lambda found: written[found[0]], text) for text in texts)


def _template(value: str | None) -> str | None:
    """The text of the template that `--chat-template` names, empty for `none`. Raises InputError for other values."""
    if value is None:
        return None
    if value == "none":
        return ""
    file = paths.absolute(value)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--chat-template {value}: {error}", hint="none, or a file with a Jinja template") from None
    if not text.strip():
        raise InputError(f"--chat-template {value} is empty", hint="--chat-template none shows the question alone")
    return text


def _arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """The variables of `--template-arg`; values are JSON, or else text. Raises InputError for other forms."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, is_pair, value = pair.partition("=")
        if not is_pair or not key.isidentifier():
            raise InputError(f"--template-arg {pair}: no KEY=VALUE", hint="--template-arg enable_thinking=false")
        try:
            found[key] = parse_json(value.lower() if value in {"True", "False"} else value)
        except ValueError:
            found[key] = value
    return found


def _engines(text: str | None, tensor_parallel: int) -> int | None:
    """Number of engines for `--gpus`, None for all. Raises InputError for no number, and for GPUs that are left."""
    if text is None or text == "all":
        return None if text else 1
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise InputError(f"--gpus {text}: no number of GPUs", hint="--gpus all, or --gpus 8")
    if int(text) % tensor_parallel:
        what = f"--gpus {text} cannot be divided into engines of {tensor_parallel} GPUs (--tp)"
        raise InputError(what, hint=f"--gpus {int(text) // tensor_parallel * tensor_parallel or tensor_parallel}")
    return int(text) // tensor_parallel


def _rotation(text: str, rollout: str) -> int | str:
    """The block that `--rotation` names. Raises InputError for any other text, and for a precision without one."""
    if text in ("auto", "off"):
        return 0 if text == "off" else text
    if text not in map(str, BLOCKS):
        raise InputError(f"--rotation {text}: no such block", hint=f"auto, {', '.join(map(str, BLOCKS))} or off")
    if rollout not in ROTATED:
        raise InputError(f"--rotation {text} is not for {rollout}", hint=f"--rollout {ROTATED[0]}")
    return int(text)


def _evaluate(
    output: Output, lookup: Callable[[], Request], patterns: list[str], *, watch: bool, png: bool, html: bool
) -> None:
    from flashrl_cli.evals import evaluation
    from flashrl_cli.render import figure

    for package in ("matplotlib",) * png + ("jinja2",) * html:
        figure.require(package)
    if watch:
        with _progress(output, "evaluating what is saved", None) as progress:
            finished = evaluation.watch(lookup, patterns, progress, partial(_show_newest, output))
    else:
        request = lookup()
        sets = ", ".join(f"{one.name} ({len(one.questions):,})" for one in request.data)
        label = f"evaluating {counted(len(request.checkpoints), 'checkpoint')} on {sets}"
        with _progress(output, label, request.prompts) as progress:
            finished = evaluation.evaluate(request, progress)
    _draw(output, finished, png=png, html=html)
    _show(output, finished, watch=watch)
    if finished.report.threshold:
        finished.report.threshold.require()
    finished.report.require_all()


@contextlib.contextmanager
def _progress(output: Output, label: str, prompts: int | None) -> Iterator[Progress]:
    from flashrl_cli.evals.evaluation import Progress

    with output.progress(label, prompts) as advance:
        speed = Speed()
        yield Progress(say=output.say, advance=lambda n, tokens: advance(n, speed.after(tokens)))


class Speed:
    """Generated tokens per second since the first tokens arrived."""

    def __init__(self) -> None:
        self._tokens = 0
        self._began: float | None = None

    def after(self, tokens: int) -> str:
        """The speed after `tokens` more tokens, as text; empty until it can be computed."""
        now = time.monotonic()
        if self._began is None:
            self._began = now if tokens else None
            return ""
        self._tokens += tokens
        return f"{self._tokens / (now - self._began):,.0f} tokens/s" if now > self._began else ""


def _show_newest(output: Output, report: Report) -> None:
    """Show the result of one search while other checkpoints are still to come."""
    if output.json_mode:
        output.json_line(report.document())
    else:
        output.table(*report.table())


def _draw(output: Output, finished: Finished, *, png: bool, html: bool) -> None:
    """Write what `--png` and `--html` ask for, or say why there is nothing to draw."""
    from flashrl_cli import files
    from flashrl_cli.render import figure
    from flashrl_cli.render.html import leaderboard_page

    report, folder = finished.report, finished.folder
    curves = [figure.Series(**curve) for curve in report.curves()]
    if png and curves:
        figure.write_png([figure.panel(curves, "accuracy")], folder / "eval.png")
    if png and report.boards:
        figure.write_ranking_png([board.document() for board in report.boards], folder / "leaderboard.png")
    if png and not (curves or report.boards):
        output.warn("no eval.png: a curve needs two steps of a run, and a leaderboard several models")
    if html and report.boards:
        files.write_text(folder / "leaderboard.html", leaderboard_page(report.document()))
    elif html:
        output.warn("no leaderboard.html: a leaderboard needs several models")


def _show(output: Output, finished: Finished, *, watch: bool) -> None:
    from flashrl_cli.render import figure
    from flashrl_cli.render.text_plot import text_panel

    report, folder = finished.report, finished.folder
    curves = [figure.Series(**curve) for curve in report.curves()]
    if output.json_mode:
        (output.json_line if watch else output.document)(report.document())
        return
    output.table(*report.table())
    for sentence in report.verdicts:
        output.text(sentence)
    if curves and figure.installed("plotext"):
        output.text(text_panel(figure.panel(curves, "accuracy, 95 % interval")))
    output.say(f"written to {folder}; `flashrl eval show {folder}` reads the responses")


def _merge(output: Output, patterns: list[str], target: Path, least: float | None) -> None:
    from flashrl_cli import files
    from flashrl_cli.errors import InputError
    from flashrl_cli.runs.checkpoints import find
    from flashrl_cli.runs.merge import merged

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

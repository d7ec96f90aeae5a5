"""`flashrl eval show`: read the responses of an evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli.cli.options import Json
from flashrl_cli.errors import InputError
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.evals.responses import View
    from flashrl_cli.render.output import Output

SCHEMA_VERSION = 1
_WIDEST = 100


def show(
    where: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER",
            help="An evaluation's folder, a run's checkpoints, or a responses.parquet.",
            show_default="the newest under the checkpoints",
        ),
    ] = None,
    *,
    worst: Annotated[bool, typer.Option("--worst", help="Questions that fewest responses get right.")] = False,
    changed: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="A B", help="Questions right at step A and wrong at step B, and the other way."),
    ] = None,
    question: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="All responses to question N, counted from 1.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="The step for --worst and --question.", show_default="the best; all")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run.", show_default="the one with most steps")] = None,
    dataset: Annotated[str | None, typer.Option(help="Name of the data set.", show_default="the first")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions to show, of each kind.")] = 10,
    full: Annotated[bool, typer.Option("--full", help="Do not leave out the middle of long texts.")] = False,
    json: Json = False,
) -> None:
    """Read responses of an evaluation.

    Without an option: what is there, and the questions that changed from the first step to the best.

    flashrl eval show --worst --limit 3

    flashrl eval show checkpoints/flashrl/tiny --changed 20 40
    """
    from flashrl_cli.evals import responses
    from flashrl_cli.render.output import Output

    if sum((worst, changed is not None, question is not None)) > 1:
        raise InputError("--worst, --changed and --question are three views", hint="give one of them")
    if step is not None and not (worst or question is not None):
        raise InputError("--step goes with --worst or --question", hint="--changed names both steps")
    seen = responses.view(responses.find(where), run, dataset)
    at = None if step is None else seen.checked(step)
    if worst:
        found = _worst(seen, seen.best if at is None else at, limit)
    elif question is not None:
        steps = list(seen.marks) if at is None else [at]
        found = {"view": "question", "questions": responses.questions(seen, [question], steps, brief=False)}
    elif changed:
        before, after = map(seen.checked, changed)
        found = _changed(seen, before, after, limit)
    elif seen.first != seen.best:
        found = _changed(seen, seen.first, seen.best, limit)
    else:
        found = {"view": "summary"}
    output = Output(json_mode=json)
    if json:
        output.document({"schema_version": SCHEMA_VERSION, **_summary(seen), **found})
    else:
        _print(output, seen, found, full=full, steps=not (worst or changed or question is not None))


def _worst(seen: View, step: int | None, limit: int) -> dict[str, Any]:
    from flashrl_cli.evals import responses

    numbers = responses.worst(seen, step)
    shown = responses.questions(seen, numbers[:limit], [step], brief=True)
    return {"view": "worst", "step": step, "wrong": len(numbers), "questions": shown}


def _changed(seen: View, before: int | None, after: int | None, limit: int) -> dict[str, Any]:
    from flashrl_cli.evals import responses

    found = responses.changed(seen, before, after)
    return {
        "view": "changed",
        "before": before,
        "after": after,
        "counts": {"gained": len(found.gained), "lost": len(found.lost), "same": found.same},
        "p": found.p,
        "gained": responses.questions(seen, found.gained[:limit], [before, after], brief=True),
        "lost": responses.questions(seen, found.lost[:limit], [before, after], brief=True),
    }


def _summary(seen: View) -> dict[str, Any]:
    steps = [
        {
            "step": step,
            "accuracy": seen.accuracy(step),
            "right": sum(map(sum, marks.values())),
            "responses": sum(map(len, marks.values())),
            "cut": seen.cut[step],
        }
        for step, marks in seen.marks.items()
    ]
    return {
        "file": str(seen.file),
        "run": seen.run,
        "runs": list(seen.runs),
        "dataset": seen.dataset,
        "datasets": list(seen.datasets),
        "steps": steps,
    }


def _print(output: Output, seen: View, found: dict[str, Any], *, full: bool, steps: bool) -> None:
    from flashrl_cli.render.examples import question_lines

    output.say(f"{seen.file}")
    others = [
        f"; {option} has {len(names)}: {', '.join(names)}"
        for option, names in (("--run", seen.runs), ("--dataset", seen.datasets))
        if len(names) > 1
    ]
    output.text(f"{seen.run} on {seen.dataset}{''.join(others)}")
    if steps:
        columns = ["step", "accuracy", "right", "responses", "cut"]
        rows = [{**one, "accuracy": f"{one['accuracy']:.3f}"} for one in _summary(seen)["steps"]]
        output.table(columns, [[row[name] for name in columns] for row in rows])
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    for heading, questions in _sections(seen, found):
        if heading:
            output.text(f"\n{heading}")
        for question in questions:
            output.text("")
            for line in question_lines(question, width=width, full=full):
                output.text(line)


def _sections(seen: View, found: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield headings with the questions below them."""
    match found["view"]:
        case "worst":
            wrong, step = found["wrong"], found["step"]
            total = counted(len(seen.marks[step]), "question")
            what = f"{wrong:,} {'is' if wrong == 1 else 'are'} not always answered right"
            when = "" if step is None else f" at step {step}"
            yield f"Of {total} {what}{when}. The hardest {len(found['questions'])}:", found["questions"]
        case "changed":
            yield from _changed_sections(found)
        case "question":
            yield "", found["questions"]
        case _ if len(seen.marks) > 1:
            yield "No later step has a higher accuracy than the first.", []


def _changed_sections(found: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    from flashrl_cli.evals.verdicts import p_text

    counts, after = found["counts"], found["after"]
    moved = f"{counted(counts['gained'], 'question')} gained, {counts['lost']:,} lost, {counts['same']:,} as before"
    yield f"From step {found['before']} to step {after}: {moved} ({p_text(found['p'])} for these two steps alone).", []
    for kind, meaning in (("gained", "answered right more often"), ("lost", "answered right less often")):
        if found[kind]:
            shown = f", {len(found[kind])} of {counts[kind]:,}" if len(found[kind]) < counts[kind] else ""
            yield f"{kind.upper()} ({meaning} at step {after}{shown})", found[kind]

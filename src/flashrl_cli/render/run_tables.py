"""Runs as text: the list of runs, one run in full, its checkpoints and what a prune would delete."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from flashrl_cli.machine import software
from flashrl_cli.render import figure
from flashrl_cli.render.live import describe
from flashrl_cli.render.text_plot import text_panel, text_panels
from flashrl_cli.runs.mismatch import percent
from flashrl_cli.runs.saved import writers
from flashrl_cli.text import age, binary_size, counted, duration, size
from flashrl_cli.verl.metrics import dropped_in_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flashrl_cli.render.output import Output
    from flashrl_cli.runs.delete import Prune
    from flashrl_cli.runs.mismatch import Stale
    from flashrl_cli.runs.replay import Replay
    from flashrl_cli.runs.saved import CheckpointList, Saved
    from flashrl_cli.runs.speed import Speed, Spent
    from flashrl_cli.runs.summary import AttemptRow, Row, Summary
    from flashrl_cli.verl.metrics import StepMetrics

COLUMNS = ("name", "preset", "state", "step", "reward", "acc.", "att.", "changed", "disk")
_LEFT = ("name", "preset", "state")
_DISPENSABLE = ("att.", "preset", "acc.", "disk")
"""Columns that are dropped in this order if a terminal is too narrow."""
_HOLES = 10
PLAIN = 80
"""Width of pictures where there is no terminal."""


def ago(moment: str, now: datetime | None = None) -> str:
    """Age of a time in the record, in its largest unit."""
    return age(((now or datetime.now(UTC)) - datetime.fromisoformat(moment)).total_seconds())


def listing(rows: Sequence[Row], width: int) -> list[str]:
    """The list of runs as lines, with as many columns as `width` permits."""
    columns = list(zip(COLUMNS, *_cells(rows), strict=True))
    for name in ("", *_DISPENSABLE):
        columns = [column for column in columns if column[0] != name]
        lines = aligned(list(zip(*columns, strict=True)), right=[i for i, c in enumerate(columns) if c[0] not in _LEFT])
        if max(map(len, lines)) <= width:
            break
    return lines


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of the list of runs, in the order of COLUMNS."""
    return [
        (
            row.name,
            row.preset or "–",
            row.state or "?",
            progress(row),
            _number(row.reward),
            _number(row.accuracy),
            str(row.attempts),
            ago(row.changed),
            size(row.run_bytes + row.checkpoint_bytes),
        )
        for row in rows
    ]


def progress(row: Row) -> str:
    """Done and planned steps such as `3/20`, as far as they are known."""
    if row.step is None and row.total_steps is None:
        return "–"
    return f"{row.step or 0}/{row.total_steps or '?'}"


def aligned(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Rows as lines of columns with two spaces between; columns whose index is in `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ends = set(right)
    return [
        "  ".join(
            c.rjust(w) if i in ends else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def show(out: Output, found: Summary) -> None:
    """Print one run in full on stdout."""
    for lines in (_head(found), _attempts(found.attempts)):
        out.text("\n".join(lines) + "\n")
    _paragraphs(out, _errors(found.attempts))
    start = f"the start of attempt {found.attempts[-1].number if found.attempts else '?'} took"
    for lines in (_spent(start, found.start), _spent(_step_heading(found), found.step)):
        if lines:
            out.text("\n".join(lines) + "\n")
    _paragraphs(out, _speed(found.speed))
    if found.dropped:
        _paragraphs(out, [f"dropped and not trained on: {dropped_in_words(found.dropped)}"])
    _paragraphs(out, _proof(found))
    _curve(out, found.metrics.history)
    _paragraphs(out, ["rollout against trainer", *(f"  {line}" for line in found.advice.lines)], end="")
    if found.advice.stale:
        out.text("\n" + "\n".join(_staleness(found.advice.stale)))
    if found.replay:
        out.text(f"\nother corrections, replayed on {found.replay.responses:,} responses of {found.replay.span}\n")
        _table(out, corrections(found.replay, few=True))
        _paragraphs(out, found.replay.lines, end="")


def _head(found: Summary) -> list[str]:
    row, run = found.row, found.run
    rows = [
        ("run", f"{row.name} ({row.preset or 'preset unknown'}), {row.state or 'state unknown'}, step {progress(row)}"),
        ("folder", f"{run.paths.root} ({size(row.run_bytes)})"),
        ("checkpoints", f"{run.paths.checkpoints} ({size(row.checkpoint_bytes) if row.checkpoint_bytes else 'none'})"),
    ]
    if row.problem:
        rows.append(("record", row.problem))
    if found.metrics.missing:
        shown = ", ".join(map(str, found.metrics.missing[:_HOLES])) + (
            " …" if len(found.metrics.missing) > _HOLES else ""
        )
        rows.append(("holes", f"{counted(len(found.metrics.missing), 'step')} below the last without metrics: {shown}"))
    rows += [("set aside", aside) for aside in found.set_aside]
    return aligned(rows)


def _attempts(attempts: Sequence[AttemptRow]) -> list[str]:
    if not attempts:
        return ["no attempt"]
    heading = ("attempt", "state", "started", "took", "step", "from", "exit")
    rows = [
        (
            str(one.number),
            one.state or "?",
            _local(one.started),
            duration(one.seconds),
            _whole(one.last_step),
            _whole(one.resumed_from),
            _whole(one.exit_code),
        )
        for one in attempts
    ]
    return aligned([heading, *rows], right=(0, 3, 4, 5, 6))


def _errors(attempts: Sequence[AttemptRow]) -> list[str]:
    lines = []
    for one in attempts:
        if one.error:
            lines.append(f"attempt {one.number}: {one.error}")
        if one.error and one.hint:
            lines.append(f"  hint: {one.hint}")
    return lines


def _spent(heading: str, spent: Sequence[Spent]) -> list[str]:
    """A heading with the sum, and a line for each part; empty if there are no parts."""
    if not spent:
        return []
    rows = [(f"  {one.what}", _exact(one.seconds), f"{one.share:.0%}") for one in spent]
    return [f"{heading} {_exact(sum(one.seconds for one in spent))}", *aligned(rows, right=(1, 2))]


def _step_heading(found: Summary) -> str:
    steps = found.speed.steps
    return f"a step took, as median of the last {steps}," if steps > 1 else "the step took"


def _speed(found: Speed) -> list[str]:
    """How fast the last steps were, and what slowed them, a line for each cause; empty if nothing is known."""
    slow = ["what slows a step", *(f"  {one}" for one in found.slow)] if found.slow else []
    return [*filter(None, [found.facts]), *slow]


def _exact(seconds: float) -> str:
    """Format seconds like `duration`, but with tenths below one minute."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _proof(found: Summary) -> list[str]:
    return [f"proven: {describe(found.proof)}"] if found.proof else ["proven: nothing (no rollout worker reported)"]


def _curve(out: Output, steps: Sequence[StepMetrics]) -> None:
    points = [(step.step, reward) for step in steps if (reward := step["reward"]) is not None]
    if len(points) < 2:
        return
    if not figure.installed("plotext"):
        out.say(f"no curve: plotext is not installed; {software.install_extra('plot')}")
        return
    series = figure.Series(label="reward", xs=[step for step, _ in points], ys=[reward for _, reward in points])
    out.text(text_panel(figure.panel([series], "reward")) + "\n")


STALENESS = ("staleness", "share", "tokens", "KL", "mean of -ln r", "mean weight", "cut", "sample size")
"""Columns of `by_staleness`; KL is the estimate that is never negative."""


def by_staleness(stale: Sequence[Stale]) -> list[tuple[str, ...]]:
    """A row for the tokens of each staleness, and one for those that were scored again."""
    return [
        (
            "scored again" if one.staleness is None else str(one.staleness),
            "" if one.staleness is None else percent(one.share),
            f"{one.tokens:,}",
            f"{one.kl_k3:.2g}",
            f"{one.kl:.2g}",
            _number(one.weight_mean),
            "–" if one.truncated is None else percent(one.truncated),
            "–" if one.effective is None else percent(one.effective),
        )
        for one in stale
    ]


def _staleness(stale: Sequence[Stale]) -> list[str]:
    return aligned([STALENESS, *by_staleness(stale)], right=range(1, len(STALENESS)))


CORRECTIONS = ("correction", "mean weight", "cut", "bias", "sample size", "touched", "error")
"""Columns of `corrections`."""


def corrections(found: Replay, *, few: bool = False) -> list[tuple[str, ...]]:
    """A row for each correction, the least error first; with `few` the best of each kind, and the run's own."""
    shown = found.judged
    if few:
        firsts = {(one.correction.kind, one.correction.reject is None): one for one in reversed(found.judged)}
        shown = tuple(one for one in found.judged if one in firsts.values() or one.correction == found.own)
    return [
        (
            f"{one.correction}{' (the run)' if one.correction == found.own else ''}{' (ends a run)' * one.stopped}",
            f"{one.mean:.3f}",
            percent(one.cut) if one.cut >= 0 else f"-{percent(-one.cut)}",
            "–" if one.bias is None else f"{one.bias:.3f}",
            percent(one.effective),
            percent(one.touched),
            f"{one.error():.3f}",
        )
        for one in shown
    ]


def show_correction(out: Output, found: Replay) -> None:
    """Print the comparison of corrections on stdout, with pictures if plotext is installed."""
    out.text(
        f"{found.span}: {found.responses:,} of {counted(found.trained, 'response')}, {counted(found.tokens, 'token')}\n"
    )
    _table(out, corrections(found))
    _paragraphs(out, found.lines)
    if found.by_staleness:
        out.text("\n".join(_staleness(found.by_staleness)) + "\n")
    if not figure.installed("plotext"):
        out.say(f"no picture: plotext is not installed; {software.install_extra('plot')}")
        return
    out.text(text_panels(figure.replayed(found), width=out.stdout.width if out.stdout.is_terminal else PLAIN))


def _table(out: Output, rows: Sequence[Sequence[str]]) -> None:
    out.text("\n".join(aligned([CORRECTIONS, *rows], right=range(1, len(CORRECTIONS)))) + "\n")


def _paragraphs(out: Output, lines: Sequence[str], end: str = "\n") -> None:
    """Print lines wrapped to the width, each with its indentation, and `end` after them."""
    from textwrap import wrap

    if not lines:
        return
    width = min(out.stdout.width, 120)
    wrapped = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        wrapped += wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    out.text("\n".join(wrapped) + end)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _whole(value: int | None) -> str:
    return "–" if value is None else str(value)


def _local(moment: str | None) -> str:
    if moment is None:
        return "–"
    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M")


def show_checkpoints(output: Output, listed: CheckpointList) -> None:
    """Print a run's checkpoints, including superseded ones, and on stderr notes on running and interrupted commands."""
    if not listed.saved and not listed.set_aside:
        output.say(f"no checkpoints in {listed.run.checkpoints}")
        return
    score = {"evaluation": "accuracy (evaluation)", "validation": "accuracy (validation)", "reward": "reward"}
    columns = ["step", "state", "size", "HF weights", score[listed.scores.by] if listed.scores else "score", "", "age"]
    output.table(columns, [_saved_row(listed, one) for one in listed.saved])
    if any(writers(listed.run.checkpoints)):
        output.say("the run is running: a step that is incomplete may be being saved")
    _show_set_aside(output, listed)


def _show_set_aside(output: Output, listed: CheckpointList) -> None:
    if listed.set_aside:
        rows = [[one.path.name, binary_size(one.bytes), one.reason] for one in listed.set_aside]
        output.table(["set aside", "size", "why"], rows)
        output.say(f"`flashrl runs checkpoints {listed.run.name} --set-aside` deletes what was set aside")
    if listed.leftovers:
        size = binary_size(sum(one.bytes for one in listed.leftovers))
        output.say(f"an interrupted prune left {size}: the next one deletes them")


def _saved_row(listed: CheckpointList, one: Saved) -> list[object]:
    score = listed.scores.values.get(one.step) if listed.scores else None
    marks, written = ", ".join(_marks(listed, one)), age(time.time() - one.written)
    return [one.step, _state(one), binary_size(one.bytes), one.has_hf, score, marks, written]


def _state(one: Saved) -> str:
    if one.complete:
        return "complete"
    more = f" and {len(one.problems) - 1} more" if len(one.problems) > 1 else ""
    return f"incomplete: {one.problems[0]}{more}"


def _marks(listed: CheckpointList, one: Saved) -> list[str]:
    marks = {"newest": one.step == listed.newest, "best": one.step == listed.best, "tracked": one.tracked}
    return [mark for mark, holds in marks.items() if holds] + (["LoRA"] if one.lora else [])


def show_prune(output: Output, planned: Prune) -> None:
    """Print a verdict on each step on stdout, and on stderr how many would be deleted."""
    rows: list[Sequence[object]] = [
        [
            v.saved.step,
            "stays" if v.stays else "goes",
            ", ".join(v.stays) or _state(v.saved),
            binary_size(v.saved.bytes),
        ]
        for v in planned.verdicts
    ]
    hidden = [(one, "set aside") for one in planned.set_aside]
    hidden += [(one, "left by an interrupted prune") for one in planned.leftovers]
    rows += [[one.path.name, "goes", why, binary_size(one.bytes)] for one, why in hidden]
    output.table(["step", "", "why", "size"], rows)
    output.say(f"{len(planned.going)} go, which frees {binary_size(planned.freed)}")

"""Display of a run in progress: a live table on a terminal, one line per step for logs, JSON lines for programs."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flashrl_cli.contract import ARRIVAL
from flashrl_cli.text import counted
from flashrl_cli.verl.metrics import LIVE, LIVE_BY_STALENESS, METRICS, SPARED, by_staleness

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from flashrl_cli.contract import Handshake
    from flashrl_cli.render.output import Output
    from flashrl_cli.verl.metrics import Metric, StepMetrics

SCHEMA_VERSION = 1
ROWS = 12
"""Number of steps that the live table shows."""

_GAP = 3
_FRAME = 8
"""Number of lines of the live display in addition to the rows of its table."""


def describe(handshakes: Sequence[Handshake]) -> str:
    """A one-line description of the proven precision."""
    quantized = [one for one in handshakes if one.precision != "bf16"] or handshakes
    first, plain = quantized[0], len(handshakes) - len(quantized)
    layers = f"{first.quantized_layers} of {first.linear_layers} linear layers, " if first.precision != "bf16" else ""
    workers = f"{counted(len(quantized), 'rollout worker')}"
    workers += f" and bf16 in {plain}" if plain else ""
    return f"{first.precision} in {workers}: {layers}{first.kernel}, {_extras(first)}refit {first.refit_s:.2f} s"


def _extras(worker: Handshake) -> str:
    """Options of a worker in addition to its precision, each followed by a comma; empty if there are none."""
    parts = {
        f"KV cache in {worker.kv_cache}": worker.kv_cache != "auto",
        "logits in fp32": worker.lm_head == "fp32",
        f"{counted(worker.smoothed, 'tensor')} smoothed": worker.smoothed > 0,
        f"inputs rotated by blocks of {worker.rotation}": worker.rotation > 0,
    }
    return "".join(f"{part}, " for part, holds in parts.items() if holds)


def eta(seconds_a_step: list[float], left: int) -> str:
    """Remaining time for `left` steps at the pace of the given steps, as `m:ss` or `h:mm:ss`."""
    if not seconds_a_step:
        return "–"
    total = int(left * sum(seconds_a_step) / len(seconds_a_step))
    hours, minutes, seconds = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class PlainDisplay:
    """Prints one line per phase on stderr and per step on stdout."""

    def __init__(self, output: Output, total: int | None) -> None:
        self.output, self.total = output, total

    def expect(self, total: int) -> None:
        """Remember the number of steps."""
        self.total = total

    def phase(self, text: str) -> None:
        """Print the phase on stderr."""
        self.output.say(f"{text} …")

    def proven(self, handshakes: list[Handshake], /) -> None:
        """Print the proof on stderr."""
        self.output.say(f"proven: {describe(handshakes)}")

    def step(self, metrics: StepMetrics) -> None:
        """Print the step on stdout."""
        shown = [*LIVE, *_by_staleness([metrics])]
        fields = [f"{one.heading} {one.cell(value)}" for one in shown if (value := metrics[one.name]) is not None]
        if metrics.accuracy is not None:
            fields.insert(0, f"accuracy {metrics.accuracy:.3f}")
        self.output.text(f"step {metrics.step}/{self.total or '?'}  " + "  ".join(fields))

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self.output.warn(text)

    def tick(self) -> None:
        """Do nothing: printed lines do not change."""

    def over(self, state: str, *, exit_code: int, error: str | None = None) -> None:
        """Print the end of the run on stderr."""
        self.output.say(_ending(state, exit_code, error))


class JsonDisplay:
    """Prints one JSON object per line on stdout: phase, proof and step events."""

    def __init__(self, output: Output, total: int | None) -> None:
        self.output, self.total = output, total

    def _event(self, event: str, **data: Any) -> None:
        self.output.json_line({"schema_version": SCHEMA_VERSION, "event": event, **data})

    def expect(self, total: int) -> None:
        """Remember the number of steps."""
        self.total = total

    def phase(self, text: str) -> None:
        """Print event `phase`."""
        self._event("phase", doing=text)

    def proven(self, handshakes: list[Handshake], /) -> None:
        """Print event `proof`, with every worker's handshake."""
        self._event("proof", workers=[asdict(one) for one in handshakes])

    def step(self, metrics: StepMetrics) -> None:
        """Print event `step`, with every metric that flashrl names and the seconds of each phase."""
        values = {**metrics.values, "accuracy": metrics.accuracy, "seconds": dict(metrics.seconds)}
        self._event("step", step=metrics.step, total=self.total, **values)

    def warn(self, text: str) -> None:
        """Print event `warning`."""
        self._event("warning", text=text)

    def tick(self) -> None:
        """Do nothing: printed lines do not change."""

    def over(self, state: str, *, exit_code: int, error: str | None = None) -> None:
        """Print event `end`."""
        self._event("end", state=state, exit_code=exit_code, error=error)


class LiveDisplay:
    """A table that is redrawn: the last steps, the current phase, the remaining time."""

    def __init__(self, title: str, total: int | None, elapsed_s: float = 0.0) -> None:
        self.title, self.total = title, total
        self.rows: deque[StepMetrics] = deque(maxlen=ROWS)
        self.proof = self.warning = ""
        self.doing, self.since = "starting", time.monotonic()
        self.started = time.monotonic() - elapsed_s
        self.ending: str | None = None
        self.redraw: Callable[[], None] = lambda: None

    def expect(self, total: int) -> None:
        """Remember the number of steps."""
        self.total = total

    def phase(self, text: str) -> None:
        """Show the phase below the table, with the time since it began."""
        self.doing, self.since = text, time.monotonic()

    def proven(self, handshakes: list[Handshake], /) -> None:
        """Show the proof below the table."""
        self.proof = describe(handshakes)

    def step(self, metrics: StepMetrics) -> None:
        """Add a row for the step."""
        self.rows.append(metrics)
        self.doing, self.since = f"step {metrics.step + 1}", time.monotonic()

    def warn(self, text: str) -> None:
        """Show the warning below the table, from now on."""
        self.warning = text

    def tick(self) -> None:
        """Redraw the table, because its times change."""
        self.redraw()

    def over(self, state: str, *, exit_code: int, error: str | None = None) -> None:
        """Show how the run ended instead of the current phase."""
        self.ending = _ending(state, exit_code, error)
        self.redraw()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        # the table has the current size of the terminal, which may have been resized
        yield self._table(options.max_width, console.height) if self.rows else Text(self.title, style="bold")
        if self.rows and self.rows[-1].seconds:
            yield Text(_phases(self.rows[-1]), style="dim")
        if self.proof:
            yield Text(f"✓ {self.proof}", style="green")
        if self.warning:
            yield Text(f"warning: {self.warning}", style="yellow")
        yield Text(self._now())

    def _now(self) -> str:
        if self.ending is not None:
            return self.ending
        done = self.rows[-1].step if self.rows else 0
        elapsed = int(time.monotonic() - self.started)
        line = f"⏵ {self.doing} ({time.monotonic() - self.since:.0f} s) · {elapsed // 60}:{elapsed % 60:02} elapsed"
        paces = [pace for row in self.rows if (pace := row["step_s"])]
        left = eta(paces, self.total - done) if self.total else "–"
        return f"{line} · {left} left" if paces else line

    def _table(self, width: int, height: int) -> RenderableType:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        out = Table(
            title=Text(self.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        rows = list(self.rows)[-max(1, height - _FRAME - bool(self.warning)) :]
        kls, weights = (by_staleness(name, rows)[::-1] for name in LIVE_BY_STALENESS)
        columns = _fitting(self._columns(rows), width, [*weights, *SPARED, *kls])
        for heading in columns:
            out.add_column(heading, justify="right", no_wrap=True)
        for cells in zip(*columns.values(), strict=True):
            out.add_row(*cells)
        return out

    def _columns(self, rows: Sequence[StepMetrics]) -> dict[str, list[str]]:
        """Cells of `rows` by heading; accuracy, figures of 8-bit weights and by staleness only if a row has them."""
        columns = {"step": [f"{row.step}/{self.total or '?'}" for row in rows]}
        if any(row.accuracy is not None for row in rows):
            columns["accuracy"] = [METRICS["accuracy"].cell(row.accuracy) for row in rows]
        shown = [one for one in LIVE if one.name not in ARRIVAL or any(row[one.name] is not None for row in rows)]
        shown += _by_staleness(rows)
        return columns | {one.heading: [one.cell(row[one.name]) for row in rows] for one in shown}


def _by_staleness(rows: Sequence[StepMetrics]) -> list[Metric]:
    """Columns for each staleness of the tokens in `rows`; none in mode `sync`."""
    return [one for name in LIVE_BY_STALENESS for one in by_staleness(name, rows)]


def _fitting(columns: dict[str, list[str]], width: int, spared: Sequence[Metric]) -> dict[str, list[str]]:
    """The columns that fit into a terminal of `width`; those of `spared` are left out in its order."""
    fitting = dict(columns)
    for metric in spared:
        needed = sum(max(map(len, (name, *cells))) + _GAP for name, cells in fitting.items())
        if needed <= width:
            break
        fitting.pop(metric.heading, None)
    return fitting


@contextlib.contextmanager
def display_for(
    output: Output, *, title: str, total: int | None, elapsed_s: float = 0.0
) -> Iterator[PlainDisplay | JsonDisplay | LiveDisplay]:
    """Choose the display that fits the reader of `output`.

    `total` is the number of steps, if known, `elapsed_s` the seconds that the run has taken so far.
    """
    if output.json_mode:
        yield JsonDisplay(output, total)
    elif not output.live:
        yield PlainDisplay(output, total)
    else:
        display = LiveDisplay(title, total, elapsed_s)
        with _live(output.stderr, display) as redraw:
            display.redraw = redraw
            yield display


@contextlib.contextmanager
def _live(console: Console, renderable: RenderableType) -> Iterator[Any]:
    from rich.live import Live

    # drawn on each tick of the supervisor, so that no second thread draws while a signal is handled
    with Live(renderable, console=console, auto_refresh=False) as live:
        yield live.refresh


def _ending(state: str, exit_code: int, error: str | None) -> str:
    code = f" (exit code {exit_code})" if exit_code else ""
    return f"{state}{code}: {error}" if error else f"{state}{code}"


def _phases(row: StepMetrics) -> str:
    return "s/step by phase: " + "  ".join(f"{phase} {seconds:.1f}" for phase, seconds in row.seconds.items())

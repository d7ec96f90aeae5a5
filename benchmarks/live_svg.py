"""Export the live table of a finished run as an SVG, as rich draws it.

python benchmarks/live_svg.py runs/NAME/attempt_N docs/live.svg
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from flashrl_cli import files
from flashrl_cli.contract import read_handshakes
from flashrl_cli.render.live import LiveDisplay
from flashrl_cli.runs.metrics import read_metrics

WIDTH = 118


def main() -> None:
    """Replay the attempt's metrics into the live display and export it."""
    attempt, out = Path(sys.argv[1]), Path(sys.argv[2])
    steps = read_metrics(attempt / "metrics.jsonl")
    display = LiveDisplay(f"flashrl train · {attempt.parent.name}", total=steps[-1].step)
    display.proven(list(read_handshakes(attempt / "plugins")))
    for step in steps[:-3]:
        display.step(step)
    display.started -= sum(step["step_s"] or 0 for step in steps[:-3])
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(display)
    files.write_text(out, console.export_svg(title="flashrl train --preset tiny"))


if __name__ == "__main__":
    main()

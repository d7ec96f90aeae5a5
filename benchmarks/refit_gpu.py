"""Measure refits of a running engine and its tokens per second, for each rollout precision, on one GPU.

    PYTHONPATH=.:src:SITE python benchmarks/refit_gpu.py --out benchmarks/results/refit_gpu.json \\
        [--points POINT,POINT] [--budget 520]

A point is `refit:SIZE:PRECISION:DTYPE` (SIZE one of Qwen2.5's or its first layers, `7b/4`; DTYPE of the weights sent, 2
GiB a bucket; the time is the engine's own, without the transfer) or `speed:SIZE:PRECISION:SEQUENCES+SEQUENCES:TOKENS`.
Weights are random. Every point runs in a separate process (refit_points.py) and is written as soon as it is known;
points that no longer fit into the budget are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.fit_on_gpu import run_child

from flashrl_cli import files

POINTS = (
    "refit:32b:int8:bfloat16",
    "refit:32b:fp8:bfloat16",
    "refit:7b:int8:bfloat16",
    "refit:7b:fp8:bfloat16",
    "refit:7b:int8:float32",
    "refit:7b:bf16:bfloat16",
    *(f"speed:7b:{precision}:64+256:512" for precision in ("bf16", "int8", "fp8", "fp8-block")),
)
NEEDED_S = 60
"""Seconds that must be left for a point to be started."""


def run_point(point: str, folder: Path, limit: float) -> dict[str, Any]:
    """Run a point, ended after `limit` seconds; its result, or the end of its output."""
    out, log = folder / "result.json", folder / "log.txt"
    out.unlink(missing_ok=True)
    started = time.monotonic()
    code = run_child(
        [sys.executable, str(Path(__file__).with_name("refit_points.py")), point, str(out)], folder, log, limit
    )
    seconds = round(time.monotonic() - started, 1)
    if out.exists():
        return {"point": point, **json.loads(out.read_text()), "seconds": seconds}
    return {
        "point": point,
        "failed": f"exit {code}",
        "seconds": seconds,
        "log": log.read_text(errors="replace")[-6000:],
    }


def told(result: dict[str, Any]) -> str:
    """A point's figures in one line."""
    if "failed" in result:
        return f"{result['failed']}\n{result['log']}"
    if "tokens_s" in result:
        return f"{result['tokens_s']} tokens/s"
    ways = [f"{how} {result[how]['median_s']} s, {result[how]['extra_gib']} GiB" for how in ("layerwise", "in place")]
    return f"{'; '.join(ways)}; same bits: {result.get('same')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default=",".join(POINTS), help="comma-separated; default: %(default)s")
    parser.add_argument("--budget", type=float, default=520, help="seconds for all points (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refit_gpu.json"))
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.budget
    results: list[dict[str, Any]] = []
    command = "python benchmarks/refit_gpu.py " + " ".join(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        for point in arguments.points.split(","):
            left = end - time.monotonic()
            if left < NEEDED_S:
                print(f"{point}: left out, {left:.0f} s left", flush=True)
                continue
            result = run_point(point, Path(folder), left)
            results.append(result)
            files.write_json(arguments.out, {"schema_version": 1, "command": command, "points": results})
            print(f"{point}: {told(result)} in {result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()

"""The main job from nothing, on this machine: prepare, train with INT8 rollouts and TIS, evaluate every checkpoint.

`make demo` runs it. It calls the same commands as a user and writes demo/summary.json, demo/curve.txt and
demo/curve.png. Ends with 5 when accuracy rose by less than 0.20.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flashrl_cli import files
from flashrl_cli.contract import read_handshakes
from flashrl_cli.errors import ExitCode

ROOT = Path("demo").resolve()
RUN = "demo"
CAP = 2.0
RISE = 0.20
ENV = {
    "FLASHRL_DATA": str(ROOT / "data"),
    "FLASHRL_RUNS": str(ROOT / "runs"),
    "FLASHRL_CHECKPOINTS": str(ROOT / "checkpoints"),
}


def flashrl(*args: str, capture: bool = False) -> tuple[str, float]:
    """Run a flashrl command as a user would; returns its stdout (when captured) and seconds.

    Ends this program if it fails.
    """
    print(f"\n$ flashrl {' '.join(args)}", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "flashrl_cli", *args]
    stdout = subprocess.PIPE if capture else None
    done = subprocess.run(command, env={**os.environ, **ENV}, stdout=stdout, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or "", time.monotonic() - started


def summary(evaluation: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """What the demo proves: accuracy by step, the precision that the rollout workers held, and the seconds it took."""
    handshake = next(read_handshakes(ROOT / "runs" / RUN / "attempt_1" / "plugins"))
    return {
        "schema_version": 1,
        "steps": [{"step": row["step"], "accuracy": row["accuracy"]} for row in evaluation["results"]],
        "rollout": handshake.precision,
        "int8_layers": handshake.quantized_layers,
        "kernel": handshake.kernel,
        "tis_cap": CAP,
        "wall_s": {name: round(value, 1) for name, value in {**seconds, "total": sum(seconds.values())}.items()},
    }


def main() -> None:
    """Run the three commands, write the summary, and judge the rise."""
    for used in ("runs", "checkpoints"):
        shutil.rmtree(ROOT / used, ignore_errors=True)
    seconds = {}
    _, seconds["prepare"] = flashrl("prepare", "tiny")
    _, seconds["train"] = flashrl("train", "--preset", "tiny", "--rollout", "int8", "--tis", f"{CAP:g}", "--name", RUN)
    checkpoints, model = str(ROOT / "checkpoints" / "tiny" / RUN), str(ROOT / "data" / "tiny" / "model")
    sampling = ("--dataset", "tiny", "--temperature", "1", "--max-tokens", "16")
    text, seconds["eval"] = flashrl(
        "eval", f"{checkpoints}/*", "--base", model, *sampling, "--out", str(ROOT), "--png", "--json", capture=True
    )
    evaluation = json.loads(text)
    result = summary(evaluation, seconds)
    files.write_json(ROOT / "summary.json", result)
    report(evaluation, result)


def report(evaluation: dict[str, Any], result: dict[str, Any]) -> None:
    """Print table and curve, keep the curve as text and PNG, and end with 5 if accuracy did not rise enough."""
    from flashrl_cli.render.figure import Series, panel
    from flashrl_cli.render.output import Output
    from flashrl_cli.render.text_plot import text_panel

    rows = evaluation["results"]
    columns = ("step", "accuracy", "lo", "hi", "n", "mean_length")
    Output().table(columns, [[row[column] for column in columns] for row in rows])
    keys = {"xs": "step", "ys": "accuracy", "los": "lo", "his": "hi"}
    series = Series(label=RUN, **{k: [row[v] for row in rows] for k, v in keys.items()})
    curve = text_panel(panel([series], "accuracy"))
    print(curve)
    files.write_text(ROOT / "curve.txt", curve + "\n")
    (ROOT / "eval.png").replace(ROOT / "curve.png")
    rise = rows[-1]["accuracy"] - rows[0]["accuracy"]
    print(
        f"accuracy {rows[0]['accuracy']:.3f} → {rows[-1]['accuracy']:.3f} in {rows[-1]['step']} steps, "
        f"{result['rollout']} rollouts ({result['int8_layers']} layers, {result['kernel']}), TIS {CAP:g}, "
        f"{result['wall_s']['total']:.0f} s; demo/summary.json"
    )
    if rise < RISE:
        print(f"error: accuracy rose by {rise:.3f}, less than {RISE}", file=sys.stderr)
        sys.exit(ExitCode.THRESHOLD)


if __name__ == "__main__":
    main()

"""Compare data-free W8A8 of a model by flashrl and by llmcompressor: seconds, and the error of each layer.

    PYTHONPATH=. python benchmarks/quantize_vs_llmcompressor.py PYTHON [--layers 6] [--repeat 3]

PYTHON is the interpreter of an environment of llmcompressor's own: it cannot share flashrl's. The model has
Qwen2.5-1.5B's shapes and random weights (6 layers: 1.0 GB in bf16). llmcompressor runs in its two ways: `oneshot` with
a QuantizationModifier on the loaded model, and `model_free_ptq`, which goes from file to file. The commands take turns,
and take what their start takes; `core` leaves out imports. Errors are those of the stored values times the stored
scales, in float64, against the bf16 weights. 1 is returned if the layers are not the same, or one of ours has an error
that is 5 % above theirs. (Theirs are larger in INT8: its scales are stored in bf16.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCHEMES = {"int8": "W8A8", "fp8": "FP8_DYNAMIC"}
"""Ours, and llmcompressor's names for the same: channel-wise weights, dynamic activations by token."""
PACKAGES = ("flashrl-cli", "torch", "safetensors")
TOLERANCE = 0.05
Errors = dict[str, float]


def by_flashrl(model: str, out: str, scheme: str) -> float:
    """Seconds of the core."""
    from benchmarks.quantize_disk import quantize

    return quantize(model, out, scheme)


def by_oneshot(model: str, out: str, scheme: str) -> float:
    """Seconds of loading, quantizing and saving."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    started = time.monotonic()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    oneshot(model=loaded, recipe=QuantizationModifier(targets="Linear", scheme=SCHEMES[scheme], ignore=["lm_head"]))
    loaded.save_pretrained(out, save_compressed=True)
    return time.monotonic() - started


def by_model_free(model: str, out: str, scheme: str) -> float:
    """Seconds from file to file, in as many threads as there are cores."""
    from llmcompressor import model_free_ptq

    ignore = ["lm_head", "model.embed_tokens"]
    started = time.monotonic()
    workers = os.cpu_count() or 1
    model_free_ptq(model, out, scheme=SCHEMES[scheme], ignore=ignore, max_workers=workers, device="cpu")
    return time.monotonic() - started


WAYS = {"flashrl": by_flashrl, "oneshot": by_oneshot, "model_free_ptq": by_model_free}


def errors(model: Path, quantized: Path) -> Errors:
    """‖W − Q·s‖ / ‖W‖ of every layer with a scale."""
    import torch
    from safetensors import safe_open

    stored: list[Any] = [safe_open(file, framework="pt") for file in sorted(quantized.glob("*.safetensors"))]
    place = {name: opened for opened in stored for name in opened.keys()}  # noqa: SIM118 - no mapping
    found = {}
    for file in sorted(model.glob("*.safetensors")):
        opened: Any = safe_open(file, framework="pt")
        for name in opened.keys():  # noqa: SIM118
            if f"{name}_scale" in place:
                weight = opened.get_tensor(name).double()
                scale = place[f"{name}_scale"].get_tensor(f"{name}_scale").double()
                values = place[name].get_tensor(name).to(torch.float64)
                found[name] = float((weight - values * scale).norm() / weight.norm())
    return found


def timed(python: str, way: str, model: Path, out: Path, scheme: str) -> dict[str, float]:
    """Seconds of one way in a separate process; its output is shown only if it fails, which ends this script."""
    shutil.rmtree(out, ignore_errors=True)
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    argv = [python, __file__, "--way", way, str(model), str(out), scheme]
    done = subprocess.run(argv, env=env, check=False, capture_output=True, encoding="utf-8")
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(f"{way} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return {"seconds": seconds, "core_s": json.loads(done.stdout.splitlines()[-1])}


def compare(python: str, model: Path, scheme: str, repeat: int) -> dict[str, Any]:
    """All ways by turns; medians, and each layer's errors side by side."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    lost: dict[str, Errors] = {}
    for _ in range(repeat):
        for way, some in runs.items():
            out = model.parent / way
            some.append(timed(sys.executable if way == "flashrl" else python, way, model, out, scheme))
            lost[way] = errors(model, out)
            shutil.rmtree(out)
    medians = {
        way: {key: round(statistics.median(run[key] for run in some), 2) for key in some[0]}
        for way, some in runs.items()
    }
    ours, theirs = lost["flashrl"], [lost[way] for way in WAYS if way != "flashrl"]
    ratios = [ours[name] / other[name] for other in theirs for name in ours if name in other]
    return {
        "scheme": scheme,
        "layers": len(ours),
        "same_layers": all(other.keys() == ours.keys() for other in theirs),
        "error_of_theirs": {"least": round(min(ratios), 4), "most": round(max(ratios), 4)},
        "mean_error": {way: statistics.fmean(found.values()) for way, found in lost.items()},
        "medians": medians,
        "times_faster": {
            way: {key: round(medians[way][key] / medians["flashrl"][key], 2) for key in ("seconds", "core_s")}
            for way in WAYS
            if way != "flashrl"
        },
        "errors": lost,
    }


def main() -> int:
    """Compare both schemes, print and store the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="?")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantize_vs_llmcompressor.json"))
    parser.add_argument("--way", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        way, *words = args.way
        print(json.dumps(WAYS[way](*words)))
        return 0
    from benchmarks.quantize_disk import make

    from flashrl_cli import files

    probe = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in %r}))"
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    theirs = subprocess.run(
        [args.python, "-c", probe % (names,)], check=True, capture_output=True, encoding="utf-8"
    ).stdout
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        model = Path(folder) / "model"
        make(model, args.layers, "bfloat16")
        cases = [compare(args.python, model, scheme, args.repeat) for scheme in SCHEMES]
    for case in cases:
        print(json.dumps({key: value for key, value in case.items() if key != "errors"}))
    result = {
        "command": f"python benchmarks/quantize_vs_llmcompressor.py PYTHON --layers {args.layers}",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "versions_of_theirs": json.loads(theirs),
        "cases": cases,
    }
    files.write_json(args.out, result)
    return int(not all(case["same_layers"] and case["error_of_theirs"]["most"] <= 1 + TOLERANCE for case in cases))


if __name__ == "__main__":
    sys.exit(main())

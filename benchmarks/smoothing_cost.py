"""Measure what a smoothing profile adds to each refit: smoothing all tensors of a model on the device, or copying them.

    PYTHONPATH=.:src python benchmarks/smoothing_cost.py --sizes 7b,32b --profiles DIR \\
        --out benchmarks/results/smoothing_cost.json

SIZE is one of Qwen2.5's or its first layers (`7b/4`). Weights are random and all layers share the same memory; scales
are random, for every tensor that can have one. The profiles stay in DIR, so that complete refits can be timed with them
and without (compare `in place`; the direct `layerwise` call next to it smooths nothing):

    FLASHRL_ROLLOUT='{"profile": "DIR/7b.safetensors"}' PYTHONPATH=.:src:SITE \\
        python benchmarks/refit_points.py refit:7b:int8:bfloat16 OUT
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.fit_points import shape
from benchmarks.refit_points import names

from flashrl_cli import files
from flashrl_cli.weights.profile import About, Profile

if TYPE_CHECKING:
    import torch

REPEATS = 7
READERS = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "o_proj.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "down_proj.weight",
)
MAKERS = ("input_layernorm.weight", "post_attention_layernorm.weight", "v_proj.weight", "v_proj.bias", "up_proj.weight")


def make_profile(size: str, file: Path) -> Profile:
    """A profile with scales wherever a calibration can put some."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    scales: dict[str, torch.Tensor] = {}
    for name, sizes in names(shape(size)):
        if name.endswith(READERS):
            scales[f"{name}.columns"] = 2.0 ** torch.randint(-4, 5, (sizes[1],))
        if name.endswith(MAKERS):
            scales[f"{name}.rows"] = 2.0 ** torch.randint(-4, 5, (sizes[0],))
    about = About(model=size, fingerprint="", shape={}, data="random", alpha=None, samples=0, tokens=0, versions={})
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(scales, file, about.metadata())
    return Profile.read(file)


def measure(size: str, file: Path, device: str) -> dict[str, Any]:
    """Median seconds of smoothing all tensors and of copying those that are smoothed, and of the first smoothing."""
    import torch

    profile = make_profile(size, file)
    memory: dict[tuple[int, ...], torch.Tensor] = {}
    tensors = []
    for name, sizes in names(shape(size)):
        if name not in profile.lengths:
            continue
        if sizes not in memory:
            memory[sizes] = torch.randn(sizes, device=device, dtype=torch.bfloat16)
        tensors.append((name, memory[sizes]))

    def smooth() -> None:
        for name, tensor in tensors:
            profile.apply(name, tensor)

    def copy() -> None:
        for _, tensor in tensors:
            tensor.clone()

    first = seconds(smooth, device)
    copied, smoothed = (sorted(seconds(work, device) for _ in range(REPEATS)) for work in (copy, smooth))
    return {
        "size": size,
        "tensors": len(tensors),
        "gib": round(sum(tensor.nbytes for _, tensor in tensors) / 2**30, 2),
        "profile_mib": round(file.stat().st_size / 2**20, 1),
        "first_s": first,
        "copy_s": statistics.median(copied),
        "smooth_s": statistics.median(smoothed),
        "all_smooth_s": smoothed,
    }


def seconds(work: Callable[[], None], device: str) -> float:
    """Wall seconds until the device is done."""
    import torch

    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return round(time.perf_counter() - started, 5)


def main() -> None:
    """Measure every size and write what was found."""
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="7b,32b")
    parser.add_argument("--profiles", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for size in asked.sizes.split(","):
        found.append(measure(size, asked.profiles / f"{size.replace('/', '-')}.safetensors", device))
        print(found[-1], flush=True)
    about = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    files.write_json(asked.out, {"schema_version": 1, **about, "points": found})


if __name__ == "__main__":
    main()

"""Compare the memory estimate with a GPU: vLLM's weights and KV tokens, and the peak of a training step under FSDP.

    PYTHONPATH=src:SITE python benchmarks/fit_on_gpu.py --out benchmarks/results/fit_on_gpu.json \\
        [--points POINT,POINT] [--budget 520]

A point is `train:SIZE:STRATEGY:TOKENS:KIND` or `engine:SIZE:PRECISION`: SIZE one of Qwen2.5's (7b/4: its first four
layers), STRATEGY fsdp or fsdp2, KIND ckpt (gradient checkpointing), plain (without) or fused (with verl's fused head),
PRECISION one of rollouts. Weights are random. Every point runs in a separate process (fit_points.py) and is written as
soon as it is known; points that no longer fit into the budget are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flashrl_cli import files

POINTS = (
    "train:0.5b:fsdp2:8192:ckpt",
    "train:1.5b:fsdp:8192:ckpt",
    "train:1.5b:fsdp2:8192:ckpt",
    "train:1.5b:fsdp2:4096:plain",
    "train:1.5b:fsdp2:16384:fused",
    "train:7b/4:fsdp:4096:ckpt",
    "train:7b/4:fsdp2:4096:ckpt",
    "train:3b:fsdp2:4096:ckpt",
    "engine:7b:bf16",
    "engine:32b:int8",
    "engine:32b:bf16",
    "engine:7b:int8",
    "engine:7b:fp8",
    "engine:32b:fp8",
    "engine:7b:fp8-block",
    "engine:32b:fp8-block",
)
NEEDED_S = {"train": 20, "engine": 45}
"""Seconds that must be left for a point to be started."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
}


def run_point(point: str, folder: Path, limit: float) -> dict[str, Any]:
    """Run a point, ended after `limit` seconds; its result, or the end of its output."""
    out, log = folder / "result.json", folder / "log.txt"
    out.unlink(missing_ok=True)
    started = time.monotonic()
    code = run_child(
        [sys.executable, str(Path(__file__).with_name("fit_points.py")), point, str(out)], folder, log, limit
    )
    text = log.read_text(errors="replace")
    seconds = round(time.monotonic() - started, 1)
    if not out.exists():
        return {"point": point, "failed": f"exit {code}", "seconds": seconds, "log": text[-3000:]}
    said = re.findall(
        r"(?:Model loading took|Available KV cache memory|GPU KV cache size|Graph capturing finished|"
        r"Sleep mode freed).*",
        text,
    )
    return {"point": point, **json.loads(out.read_text()), "exit": code, "seconds": seconds, "log": said}


def run_child(command: list[str], folder: Path, log: Path, limit: float) -> int:
    """Run a command in its own process group with its output in `log`; its exit code, negative when it was killed."""
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    caches = {f"{name}_DIR": str(folder / name.lower()) for name in ("TRITON_CACHE", "TORCHINDUCTOR_CACHE")}
    env = {**ENVIRONMENT, **caches, "VLLM_CACHE_ROOT": str(folder / "vllm"), **os.environ, "PYTHONPATH": paths}
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(command, env=env, stdout=stream, stderr=stream, start_new_session=True)
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default=",".join(POINTS), help="comma-separated; default: %(default)s")
    parser.add_argument("--budget", type=float, default=520, help="seconds for all points (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fit_on_gpu.json"))
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.budget
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for point in arguments.points.split(","):
            left = end - time.monotonic()
            if left < NEEDED_S[point.split(":")[0]]:
                print(f"{point}: left out, {left:.0f} s left", flush=True)
                continue
            result = run_point(point, Path(folder), left)
            results.append(result)
            files.write_json(arguments.out, {"schema_version": 1, "points": results})
            print(f"{point}: {result.get('ratio') or result['failed']} in {result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()

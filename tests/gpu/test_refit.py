"""Refits on a CUDA GPU with a trained policy: after 1, 2 and 10 of them the engine holds, bit for bit, what a fresh one loads.

The buckets are smaller than a layer, so that each layer comes in parts, and their memory is overwritten as soon as they are loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_refit import answers, independent, mean_difference, sequences, variants

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA GPU and the GPU stack"),
]
ROOT = Path(__file__).parents[2]
PRECISIONS = ("bf16", "int8", "fp8")
KERNELS = {
    "bf16": "UnquantizedLinearMethod",
    "int8": "CutlassInt8ScaledMMLinearKernel",
    "fp8": "CutlassFP8ScaledMMLinearKernel",
}
TOLERANCE = {"bf16": 0.03, "int8": 0.15, "fp8": 0.25}
"""Mean |Δ log-prob| of the answers against Transformers in float32."""


def gpus() -> int:
    """GPUs of this machine."""
    if shutil.which("nvidia-smi") is None:
        return 0
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout.count("GPU ")


def engine(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one engine in a process of its own; what it found."""
    folder.mkdir()
    job["out"] = str(folder / "out.json")
    (folder / "job.json").write_text(json.dumps(job))
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {
        **os.environ,
        "PYTHONPATH": paths,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "FLASHRL_PLUGIN_DIR": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "tests.gpu.engine_state", str(folder / "job.json")]
        code = subprocess.run(command, env=env, cwd=ROOT, stdout=log, stderr=log, timeout=500, check=False).returncode
    assert code == 0, (folder / "log").read_text()[-4000:]
    return dict(json.loads((folder / "out.json").read_text()))


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def found(request: pytest.FixtureRequest, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each precision fresh engines with A and B, and refitted ones; those that sleep one by one, for vLLM counts what that frees."""
    from transformers import AutoTokenizer

    tmp = tmp_path_factory.mktemp("refit")
    folders = variants(policy, tmp, tied=request.param)
    rows, length = sequences(AutoTokenizer.from_pretrained(folders["A"]))
    a, b = str(folders["A"]), str(folders["B"])
    common = {"sequences": rows, "bucket": 24 << 10, "dtype": "bfloat16"}
    jobs = {}
    for precision in PRECISIONS:
        kind = {**common, "precision": precision}
        jobs[precision, "A"] = {**kind, "model": a, "load_format": "auto", "refits": []}
        jobs[precision, "B"] = {**kind, "model": b, "load_format": "auto", "refits": []}
        jobs[precision, "refitted"] = {
            **kind, "model": a, "load_format": "dummy", "refits": [b, a] * 4 + [a, b], "sleeps": True,
        }  # fmt: skip
        jobs[precision, "float32"] = {
            **kind, "model": a, "load_format": "dummy", "refits": [a, b], "dtype": "float32", "bucket": 1 << 30,
        }  # fmt: skip
    cache = {**common, "precision": "int8", "kv_cache": "fp8", "model": a, "load_format": "dummy"}
    jobs["kv8", "once"] = {**cache, "refits": [b]}
    jobs["kv8", "refitted"] = {**cache, "refits": [a, b], "sleeps": True}
    if gpus() > 1:
        halves = {**common, "precision": "int8", "model": a, "tensor_parallel": 2}
        jobs["tp2", "B"] = {**halves, "model": b, "load_format": "auto", "refits": []}
        jobs["tp2", "refitted"] = {**halves, "load_format": "dummy", "refits": [b, a, b], "sleeps": True}
    engines: dict[tuple[str, str], dict[str, Any]] = {}
    for sleeps, at_once in ((False, 6), (True, 1)):
        keys = [key for key, job in jobs.items() if job.get("sleeps", False) is sleeps]
        with ThreadPoolExecutor(at_once) as pool:
            found = pool.map(engine, [jobs[key] for key in keys], [tmp / "-".join(key) for key in keys])
            engines.update(zip(keys, found, strict=True))
    return {
        "engines": engines,
        "truth": {name: independent(folder, rows) for name, folder in folders.items()},
        "length": length,
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_refits_leave_what_a_fresh_engine_holds(found: dict[str, Any], precision: str) -> None:
    engines = found["engines"]
    (fresh_a,), (fresh_b,) = (engines[precision, name]["digests"] for name in "AB")
    assert fresh_a != fresh_b
    assert engines[precision, "refitted"]["digests"] == [fresh_b, fresh_a] * 4 + [fresh_a, fresh_b]
    assert engines[precision, "float32"]["digests"] == [fresh_a, fresh_b]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_refitted_engines_compute_what_a_fresh_one_does(found: dict[str, Any], precision: str) -> None:
    engines = found["engines"]
    fresh = engines[precision, "B"]
    for name in ("refitted", "float32"):
        assert engines[precision, name]["logprobs"] == fresh["logprobs"]
        assert engines[precision, name]["generated"] == fresh["generated"]
    got, wanted, other = (
        answers(rows, found["length"]) for rows in (fresh["logprobs"], found["truth"]["B"], found["truth"]["A"])
    )
    assert sum(wanted) / len(wanted) > -1.0, "the policy must know sums, or this test proves nothing"
    assert mean_difference(got, wanted) < TOLERANCE[precision]
    assert mean_difference(got, wanted) < mean_difference(got, other)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_handshake_names_kernel_and_precision(found: dict[str, Any], precision: str) -> None:
    for shake in found["engines"][precision, "refitted"]["holds"]:
        assert (shake["precision"], shake["kernel"]) == (precision, KERNELS[precision])
        assert shake["quantized_layers"] == (0 if precision == "bf16" else shake["linear_layers"])


def test_the_cache_in_8_bits_gets_its_scales_at_each_refit(found: dict[str, Any]) -> None:
    once, refitted = (found["engines"]["kv8", name] for name in ("once", "refitted"))
    assert refitted["digests"][-1] == once["digests"][0], "scales are among the buffers"
    assert refitted["digests"][0] != once["digests"][0]
    assert (refitted["logprobs"], refitted["generated"]) == (once["logprobs"], once["generated"])
    assert {shake["kv_cache"] for shake in refitted["holds"]} == {"fp8"}
    got, wanted, plain = (
        answers(rows, found["length"])
        for rows in (once["logprobs"], found["truth"]["B"], found["engines"]["int8", "B"]["logprobs"])
    )
    assert got != plain
    assert mean_difference(got, wanted) < 0.25


@pytest.mark.skipif(gpus() < 2, reason="needs two GPUs")
def test_two_ranks_are_refitted_as_fresh_ones_load(found: dict[str, Any]) -> None:
    fresh, refitted = (found["engines"]["tp2", name] for name in ("B", "refitted"))
    assert len(fresh["digests"][0]) == 2
    assert refitted["digests"][-1] == fresh["digests"][0]
    assert (refitted["logprobs"], refitted["generated"]) == (fresh["logprobs"], fresh["generated"])
    assert mean_difference(*(answers(r, found["length"]) for r in (fresh["logprobs"], found["truth"]["B"]))) < 0.15

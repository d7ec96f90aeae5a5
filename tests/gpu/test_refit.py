"""Refits on a CUDA GPU with a trained policy: after 1, 2 and 10 of them the engine holds, bit for bit, what a fresh one
loads.

The buckets are smaller than a layer, so that each layer comes in parts, and their memory is overwritten as soon as they
are loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import contract
from flashrl_cli.precision import KV_CACHES
from tests.integration.test_refit import answers, independent, mean_difference, sequences, variants

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA GPU and the GPU stack"),
]
ROOT = Path(__file__).parents[2]
PRECISIONS = ("bf16", "int8", "int8+plain", "fp8")
KERNELS = {
    "bf16": "UnquantizedLinearMethod",
    "int8": "CutlassInt8ScaledMMLinearKernel",
    "int8+plain": "CutlassInt8ScaledMMLinearKernel",
    "fp8": "CutlassFP8ScaledMMLinearKernel",
}
ROTATIONS = {"bf16": 0, "int8": 128, "int8+plain": 0, "fp8": 0}
"""Blocks for a policy with 128 hidden channels and 256 in its MLP."""
TOLERANCE = {"bf16": 0.03, "int8": 0.15, "int8+plain": 0.15, "fp8": 0.25}
"""Mean |Δ log-prob| of the answers against Transformers in float32."""
CACHES = {"fp8": 0.25, "int8": 0.15}
"""The same with INT8 weights and a KV cache in 8 bits."""
LEFT_OUT = {
    "model.layers.0.self_attn.k_proj.weight": "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.1.self_attn.v_proj.bias": "model.layers.1.self_attn.qkv_proj.bias",
    "model.layers.1.mlp.down_proj.weight": "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight": "model.layers.0.input_layernorm.weight",
    "model.embed_tokens.weight": "model.embed_tokens.weight",
}
"""Tensors that an update may lack, and the engine's parameters that are not written then."""
HOW = ("by name", "in place", "layerwise")
Engines = dict[str, dict[str, Any]]
"""What was found in each of some engines (engine_state.run), by name."""


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
    if "rotation" in job:
        env[contract.ENV_ROLLOUT] = contract.RolloutOptions(rotation=job["rotation"]).text()
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "tests.gpu.engine_state", str(folder / "job.json")]
        code = subprocess.run(command, env=env, cwd=ROOT, stdout=log, stderr=log, timeout=500, check=False).returncode
    assert code == 0, (folder / "log").read_text()[-4000:]
    return dict(json.loads((folder / "out.json").read_text()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """Folders of two policies A and B, worked sums as token ids, from how far to the end they are answers, and their
    true log-probs.
    """

    tmp: Path
    folders: dict[str, str]
    rows: list[list[int]]
    length: int
    truth: dict[str, list[list[float]]]

    def job(self, **more: Any) -> dict[str, Any]:
        """Of an engine that starts with A; `more` of it."""
        common = {"sequences": self.rows, "bucket": 24 << 10, "dtype": "bfloat16", "load_format": "dummy"}
        return {**common, "model": self.folders["A"], **more}

    def fresh(self, name: str, **more: Any) -> dict[str, Any]:
        """Of an engine that loads a policy and is never refitted."""
        return self.job(model=self.folders[name], load_format="auto", refits=[], **more)

    def refits(self, names: str) -> list[str]:
        """Folders of policies by their names."""
        return [self.folders[name] for name in names]


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def policies(request: pytest.FixtureRequest, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Policies:
    from transformers import AutoTokenizer

    tmp = tmp_path_factory.mktemp("refit")
    folders = variants(policy, tmp, tied=request.param)
    rows, length = sequences(AutoTokenizer.from_pretrained(folders["A"]))
    return Policies(
        tmp=tmp,
        folders={name: str(folder) for name, folder in folders.items()},
        rows=rows,
        length=length,
        truth={name: independent(folder, rows) for name, folder in folders.items()},
    )


def results(jobs: dict[str, dict[str, Any]], folder: Path) -> Engines:
    """What engines found, up to six at once; those that sleep one by one, for vLLM counts what that frees."""
    found: Engines = {}
    for sleeps, at_once in ((False, 6), (True, 1)):
        keys = [key for key, job in jobs.items() if job.get("sleeps", False) is sleeps]
        with ThreadPoolExecutor(at_once) as pool:
            done = pool.map(engine, [jobs[key] for key in keys], [folder / key for key in keys])
            found.update(zip(keys, done, strict=True))
    return found


@pytest.fixture(scope="session")
def engines(policies: Policies) -> Engines:
    """For each precision fresh engines with A and B, and refitted ones; INT8 with an 8-bit cache, refitted once and
    twice.
    """
    jobs = {}
    for precision in PRECISIONS:
        name, _, plain = precision.partition("+")
        kind = {"precision": name, **({"rotation": 0} if plain else {})}
        jobs[f"{precision}-A"] = policies.fresh("A", **kind)
        jobs[f"{precision}-B"] = policies.fresh("B", **kind)
        jobs[f"{precision}-refitted"] = policies.job(**kind, refits=policies.refits("BABABABAAB"), sleeps=True)
        torn = [(name, how) for how in HOW for name in LEFT_OUT]
        jobs[f"{precision}-torn"] = policies.job(**kind, refits=policies.refits("AB"), torn=torn)
        whole = {"dtype": "float32", "bucket": 1 << 30}
        jobs[f"{precision}-float32"] = policies.job(**kind, refits=policies.refits("AB"), **whole)
    for name in CACHES:
        cache = {"precision": "int8", "kv_cache": KV_CACHES[name].vllm}
        jobs[f"{name}-once"] = policies.job(**cache, refits=policies.refits("B"))
        jobs[f"{name}-refitted"] = policies.job(**cache, refits=policies.refits("AB"), sleeps=True)
    return results(jobs, policies.tmp)


@pytest.fixture(scope="session")
def halves(policies: Policies) -> Engines:
    """Engines of two ranks: a fresh one with B, and a refitted one."""
    kind = {"precision": "int8", "tensor_parallel": 2}
    refitted = policies.job(**kind, refits=policies.refits("BAB"), sleeps=True)
    return results({"tp2-B": policies.fresh("B", **kind), "tp2-refitted": refitted}, policies.tmp)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_refits_leave_what_a_fresh_engine_holds(engines: Engines, precision: str) -> None:
    (fresh_a,), (fresh_b,) = (engines[f"{precision}-{name}"]["digests"] for name in "AB")
    assert fresh_a != fresh_b
    assert engines[f"{precision}-refitted"]["digests"] == [fresh_b, fresh_a] * 4 + [fresh_a, fresh_b]
    assert engines[f"{precision}-float32"]["digests"] == [fresh_a, fresh_b]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_refitted_engines_compute_what_a_fresh_one_does(policies: Policies, engines: Engines, precision: str) -> None:
    fresh = engines[f"{precision}-B"]
    for name in ("refitted", "float32"):
        assert engines[f"{precision}-{name}"]["logprobs"] == fresh["logprobs"]
        assert engines[f"{precision}-{name}"]["generated"] == fresh["generated"]
    got, wanted, other = (
        answers(rows, policies.length) for rows in (fresh["logprobs"], policies.truth["B"], policies.truth["A"])
    )
    assert sum(wanted) / len(wanted) > -1.0, "the policy must know sums, or this test proves nothing"
    assert mean_difference(got, wanted) < TOLERANCE[precision]
    assert mean_difference(got, wanted) < mean_difference(got, other)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_update_that_leaves_a_parameter_unwritten_fails(engines: Engines, precision: str) -> None:
    """And the engine is whole again after the next complete one."""
    found = engines[f"{precision}-torn"]
    unwritten = [f"the weight update left 1 parameter of the engine unwritten: {one}" for one in LEFT_OUT.values()]
    lacking = "the weight update lacked 1 tensor that the one before it brought: "
    rows = {"model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    by_name = [
        whole if precision != "bf16" and name in rows else lacking + name
        for name, whole in zip(LEFT_OUT, unwritten, strict=True)
    ]
    assert found["torn"] == [*by_name, *unwritten, *unwritten]
    assert found["digests"][-1] == engines[f"{precision}-B"]["digests"][0]
    assert found["logprobs"] == engines[f"{precision}-B"]["logprobs"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_handshake_names_kernel_and_precision(engines: Engines, precision: str) -> None:
    for handshake in engines[f"{precision}-refitted"]["holds"]:
        assert handshake["precision"] == precision.partition("+")[0]
        assert (handshake["kernel"], handshake["rotation"]) == (KERNELS[precision], ROTATIONS[precision])
        assert handshake["quantized_layers"] == (0 if precision == "bf16" else handshake["linear_layers"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_figures_of_a_refit_compare_it_with_the_one_before(engines: Engines, precision: str) -> None:
    """Although the engine slept between them, and whatever the size of the buckets."""
    first, *later = (handshake["arrival"] for handshake in engines[f"{precision}-refitted"]["holds"])
    assert first is None
    if precision == "bf16":
        assert later == [None] * 9
        return
    *changed, again, back = later
    assert {one["codes_changed"] for one in (*changed, back)} == {changed[0]["codes_changed"]}
    assert (again["codes_changed"], again["weights_changed"]) == (0, 0)
    assert 0 < changed[0]["codes_changed"] < changed[0]["weights_changed"] <= 1
    assert 0.9 < changed[0]["arrived"] < 1.1
    assert engines[f"{precision}-float32"]["holds"][1]["arrival"]["codes_changed"] == changed[0]["codes_changed"]


@pytest.mark.parametrize("cache", CACHES)
def test_the_cache_in_8_bits_gets_its_scales_at_each_refit(policies: Policies, engines: Engines, cache: str) -> None:
    once, refitted = (engines[f"{cache}-{name}"] for name in ("once", "refitted"))
    assert refitted["digests"][-1] == once["digests"][0], "scales are among the buffers"
    assert refitted["digests"][0] != once["digests"][0]
    assert (refitted["logprobs"], refitted["generated"]) == (once["logprobs"], once["generated"])
    assert {handshake["kv_cache"] for handshake in refitted["holds"]} == {cache}
    got, wanted, plain = (
        answers(rows, policies.length)
        for rows in (once["logprobs"], policies.truth["B"], engines["int8-B"]["logprobs"])
    )
    assert got != plain
    assert mean_difference(got, wanted) < CACHES[cache]


@pytest.mark.skipif(gpus() < 2, reason="needs two GPUs")
def test_two_ranks_are_refitted_as_fresh_ones_load(policies: Policies, halves: Engines) -> None:
    fresh, refitted = (halves[f"tp2-{name}"] for name in ("B", "refitted"))
    assert len(fresh["digests"][0]) == 2
    assert {handshake["rotation"] for handshake in refitted["holds"]} == {64}, "a rank has half of each input"
    assert refitted["digests"][-1] == fresh["digests"][0]
    assert (refitted["logprobs"], refitted["generated"]) == (fresh["logprobs"], fresh["generated"])
    assert mean_difference(*(answers(r, policies.length) for r in (fresh["logprobs"], policies.truth["B"]))) < 0.15

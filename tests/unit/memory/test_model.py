"""Shapes of models: from config.json, a folder, the hub's cache, and the table of common ones."""

from __future__ import annotations

import json
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


def test_llama_3_2() -> None:
    """The table has what config.json says, and the totals that the hub shows."""
    assert parameters(of_config(LLAMA)).total == 1_235_814_400
    for size, total in (("1B", 1_235_814_400), ("3B", 3_212_749_824)):
        for suffix in ("", "-Instruct"):
            shape = shape_of(f"meta-llama/Llama-3.2-{size}{suffix}", Path("/nowhere"))
            assert shape is not None
            assert parameters(shape).total == total
    assert shape_of("meta-llama/Llama-3.2-1B", Path("/nowhere")) == of_config(LLAMA)


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


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def write(folder: Path, config: object) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_and_a_prepared_model(tmp_path: Path) -> None:
    write(tmp_path / "tiny" / "model", LLAMA)
    for reference in (str(tmp_path / "tiny" / "model"), "prepared:tiny"):
        shape = shape_of(reference, tmp_path)
        assert shape is not None
        assert shape.hidden == 2048


def test_the_hub_cache_comes_before_the_table(no_cache: Path) -> None:
    folder = no_cache / "models--Qwen--Qwen2.5-7B"
    write(folder / "snapshots" / "abc", LLAMA)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc\n")
    cached, table = (shape_of(name, Path("/nowhere")) for name in ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"))
    assert cached is not None
    assert table is not None
    assert (cached.hidden, table.hidden) == (2048, 3584)


def test_other_places_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "elsewhere" / "models--me--mine"
    write(folder / "snapshots" / "abc", LLAMA)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert shape_of("me/mine", tmp_path) is None
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert shape_of("me/mine", tmp_path) is not None


def test_base_and_instruct_differ_in_context_only() -> None:
    base, chat, math = (shape_of(f"Qwen/Qwen2.5-{name}", Path()) for name in ("7B", "7B-Instruct", "Math-7B"))
    assert base is not None
    assert chat is not None
    assert math is not None
    assert (base.max_positions, chat.max_positions, math.max_positions) == (131072, 32768, 4096)
    assert base.intermediate == chat.intermediate == math.intermediate


def test_nothing_known(tmp_path: Path) -> None:
    assert shape_of("some/model", tmp_path) is None
    assert shape_of("prepared:tiny", tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert shape_of(str(tmp_path), tmp_path) is None
    (tmp_path / "config.json").write_text("[]")
    assert shape_of(str(tmp_path), tmp_path) is None


def test_a_config_that_is_no_decoder_s_says_so(tmp_path: Path) -> None:
    write(tmp_path / "vision", {"model_type": "gemma3", "text_config": {"hidden_size": 1}})
    with pytest.raises(ValueError, match="gemma3 model with text_config"):
        shape_of(str(tmp_path / "vision"), tmp_path)

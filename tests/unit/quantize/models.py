"""HF folders by hand, for tests that know no torch: safetensors files of zeros with any names, dtypes and shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashrl_cli.quantize.tensors import Entry, ShardFile

Shapes = Mapping[str, Sequence[int]]
QWEN2: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (48, 32),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.q_proj.bias": (32,),
    "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.self_attn.k_proj.bias": (16,),
    "model.layers.0.self_attn.v_proj.weight": (16, 32),
    "model.layers.0.self_attn.v_proj.bias": (16,),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.mlp.gate_proj.weight": (64, 32),
    "model.layers.0.mlp.up_proj.weight": (64, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 64),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.0.post_attention_layernorm.weight": (32,),
    "model.norm.weight": (32,),
    "lm_head.weight": (48, 32),
}
"""A Qwen2 of one layer."""
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
}  # fmt: skip
"""Its sizes, as its config.json names them."""
LAYERS = [name.removesuffix(".weight") for name in QWEN2 if name.endswith("_proj.weight")]


def saved(file: Path, shapes: Shapes, dtype: str = "BF16") -> Path:
    """A safetensors file of zeros."""
    entries = [Entry(name=name, dtype=dtype, shape=tuple(shape)) for name, shape in shapes.items()]
    with ShardFile(file, entries) as out:
        for entry in entries:
            out.write(entry.name, 0, memoryview(bytes(entry.bytes)))
    return file


def hf_model(folder: Path, shapes: Shapes = QWEN2, dtype: str = "BF16", **config: Any) -> Path:
    """A model's folder."""
    folder.mkdir(parents=True)
    saved(folder / "model.safetensors", shapes, dtype)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "tie_word_embeddings": False, **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder

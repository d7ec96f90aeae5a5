"""The sizes of a decoder from its Hugging Face config.json, and its parameter counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REQUIRED = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}
"""Attributes of a shape and the required fields of config.json that they come from."""
UNSUPPORTED = ("text_config", "kv_lora_rank", "linear_num_value_heads", "ssm_state_size", "num_nextn_predict_layers")
"""Fields of models that are not plain decoders (images, latent or linear attention), for which a guess would be far
off.
"""
GEMMA = {"gemma": 2, "gemma2": 4, "gemma3_text": 4}
"""Norms per layer of the architectures whose embeddings are tied unless config.json says otherwise."""
QK_NORM = {"qwen3", "qwen3_moe", "gemma3_text"}
QKV_BIAS = {"qwen2", "qwen2_moe"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Shape of a decoder: `intermediate` is the width of the dense MLP, `expert_intermediate` of one expert."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    max_positions: int
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    """Width of the expert that every token uses (qwen2_moe); 0 for none."""
    dense_layers: int = 0
    """Number of layers of a mixture-of-experts model that have a dense MLP instead."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2
    window: int | None = None
    """Tokens that a layer with a sliding window attends to; None if no layer has one."""
    softcap: bool = False
    """Whether attention scores are capped."""

    @property
    def query_size(self) -> int:
        """Total width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Total width of all key (or value) heads."""
        return self.kv_heads * self.head_dim

    @property
    def expert_layers(self) -> int:
        """Number of layers whose MLP is a mixture of experts."""
        return self.layers - self.dense_layers if self.experts else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Parameter counts of a complete model; `head` is 0 if it is tied to the embeddings."""

    embeddings: int
    linear: int
    """Weights of attention and dense MLPs, which rollouts quantize."""
    experts: int
    other: int
    """Parameters of norms, biases and routers."""
    head: int

    @property
    def total(self) -> int:
        """Total number of parameters."""
        return self.embeddings + self.linear + self.experts + self.other + self.head


def of_config(config: Mapping[str, Any]) -> ModelShape:
    """Shape of a model from its config.json; an unknown architecture with the usual fields is treated as a Llama.

    Raises ValueError naming the fields that are missing, or that show another kind of model.
    """
    kind = str(config.get("model_type", "unknown"))
    if strange := [field for field in UNSUPPORTED if config.get(field)]:
        raise ValueError(f"a {kind} model with {', '.join(strange)} is no plain decoder")
    size = {name: _number(config, field) for name, field in REQUIRED.items()}
    if missing := [field for name, field in REQUIRED.items() if size[name] is None]:
        raise ValueError(f"config.json of a {kind} model lacks {', '.join(missing)}")
    known = {name: value for name, value in size.items() if value is not None}
    bias = bool(config.get("attention_bias"))
    return ModelShape(
        architecture=kind,
        **known,
        kv_heads=_number(config, "num_key_value_heads") or known["heads"],
        head_dim=_number(config, "head_dim") or known["hidden"] // known["heads"],
        tied=bool(config.get("tie_word_embeddings", kind in GEMMA)),
        qkv_bias=bias or kind in QKV_BIAS,
        output_bias=bias and kind not in QKV_BIAS,
        qk_norm=kind in QK_NORM,
        norms_per_layer=GEMMA.get(kind, 2),
        window=_window(config),
        softcap=bool(config.get("attn_logit_softcapping")),
        **_mixture(config, known["layers"]),
    )


def _number(config: Mapping[str, Any], field: str) -> int | None:
    value = config.get(field)
    return value if isinstance(value, int) and value > 0 else None


def _window(config: Mapping[str, Any]) -> int | None:
    """Tokens of a sliding window that some layer uses; Qwen's configurations name one and switch it off."""
    layers = config.get("layer_types")
    if config.get("use_sliding_window") is False or (layers and "sliding_attention" not in layers):
        return None
    return _number(config, "sliding_window")


def _mixture(config: Mapping[str, Any], layers: int) -> dict[str, int]:
    """Fields of a mixture of experts, with Qwen's or Mixtral's names; empty for a dense model."""
    experts = _number(config, "num_experts") or _number(config, "num_local_experts")
    if not experts:
        return {}
    step = _number(config, "decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    return {
        "experts": experts,
        "experts_per_token": _number(config, "num_experts_per_tok") or 1,
        "expert_intermediate": _number(config, "moe_intermediate_size") or _number(config, "intermediate_size") or 0,
        "shared_intermediate": _number(config, "shared_expert_intermediate_size") or 0,
        "dense_layers": sum(1 for layer in range(layers) if layer in dense or (layer + 1) % step),
    }


def inputs(shape: ModelShape, ranks: int = 1) -> dict[str, int]:
    """Channels of the input of each linear layer of a dense decoder on one of `ranks` devices.

    Layers are named as vLLM fuses them. The first layer of a pair reads all channels, the second a device's own part.
    """
    return {
        "self_attn.qkv_proj": shape.hidden,
        "self_attn.o_proj": shape.query_size // ranks,
        "mlp.gate_up_proj": shape.hidden,
        "mlp.down_proj": shape.intermediate // ranks,
    }


def parameters(shape: ModelShape) -> Parameters:
    """Parameter counts of the model; a gated MLP has three matrices, attention four."""
    table = shape.vocab * shape.hidden
    attention = 2 * shape.hidden * (shape.query_size + shape.kv_size)
    dense = shape.layers - shape.expert_layers
    mlp = 3 * shape.hidden * (dense * shape.intermediate + shape.expert_layers * shape.shared_intermediate)
    return Parameters(
        embeddings=table,
        linear=shape.layers * attention + mlp,
        experts=_experts(shape),
        other=_other(shape),
        head=0 if shape.tied else table,
    )


def _experts(shape: ModelShape) -> int:
    return shape.expert_layers * shape.experts * 3 * shape.hidden * shape.expert_intermediate


def _other(shape: ModelShape) -> int:
    layer = shape.norms_per_layer * shape.hidden
    layer += (shape.query_size + 2 * shape.kv_size) if shape.qkv_bias else 0
    layer += shape.hidden if shape.output_bias else 0
    layer += 2 * shape.head_dim if shape.qk_norm else 0
    router = shape.expert_layers * shape.hidden * (shape.experts + bool(shape.shared_intermediate))
    return shape.layers * layer + router + shape.hidden

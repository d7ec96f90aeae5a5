"""Which tensors may be scaled against each other: what a linear layer reads, and what makes it.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, section 4): column j of a weight is multiplied by s_j, and channel j of its input divided
by it. The division costs nothing where a tensor makes that channel alone: the weight of a norm, the rows of v_proj (attention mixes
positions, not channels) and of up_proj (the activation of gate_proj is multiplied by its output). What is computed stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashrl_cli.errors import InputError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose layers are named and wired as `_layer` says (transformers/models/*/modeling_*.py)."""
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Junction:
    """A place in a model where scales can be moved: `readers` are linear modules with one input [K], `makers` tensors of K rows.

    With `copies` above 1 each of `heads` key-value heads is read by that many query heads: makers have K / copies rows.
    """

    readers: tuple[str, ...]
    makers: tuple[str, ...]
    heads: int = 1
    copies: int = 1


def junctions(config: Mapping[str, Any], shapes: Shapes) -> list[Junction]:
    """All junctions of a model, by its config.json and the shapes of its tensors.

    Raises InputError for a family whose wiring is not known, a quantized model, or norms with a bias.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(
            f"smoothing is not known for model_type {family}", hint=f"known are {known}; quantize without it"
        )
    if "quantization_config" in config:
        raise InputError("the model is quantized already", hint="calibrate the model that it was made of")
    if shifted := sorted(name for name in shapes if name.endswith("norm.bias")):
        raise InputError(f"a norm with a bias cannot take up scales: {shifted[0]}", hint="quantize without smoothing")
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    layers = range(int(config["num_hidden_layers"]))
    return [junction for layer in layers for junction in _layer(f"model.layers.{layer}", shapes, kv_heads, heads)]


def _layer(layer: str, shapes: Shapes, kv_heads: int, heads: int) -> Iterator[Junction]:
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    yield Junction(
        readers=tuple(f"{attention}.{one}_proj" for one in "qkv"),
        makers=(f"{layer}.input_layernorm.weight",),
    )
    yield Junction(
        readers=(f"{attention}.o_proj",),
        makers=_rows(f"{attention}.v_proj", shapes),
        heads=kv_heads,
        copies=heads // kv_heads,
    )
    yield Junction(
        readers=(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        makers=(f"{layer}.post_attention_layernorm.weight",),
    )
    yield Junction(readers=(f"{mlp}.down_proj",), makers=_rows(f"{mlp}.up_proj", shapes))


def _rows(module: str, shapes: Shapes) -> tuple[str, ...]:
    """Weight of a linear module, and its bias if it has one."""
    return tuple(name for name in (f"{module}.weight", f"{module}.bias") if name in shapes)

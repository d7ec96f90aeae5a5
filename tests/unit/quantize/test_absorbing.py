"""Where a model's scales can be moved, by its config and the names of its tensors."""

from __future__ import annotations

from typing import Any

import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.quantize.layers import FAMILIES, Junction, Shapes, junctions

CONFIG = {"model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
SHAPES: Shapes = {"model.layers.0.self_attn.v_proj.weight": (4, 8), "model.layers.0.mlp.up_proj.weight": (4, 8)}


def found(shapes: Shapes = SHAPES, **config: Any) -> list[Junction]:
    return junctions({**CONFIG, **config}, shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_places_a_layer(family: str) -> None:
    places = found(model_type=family)
    assert len(places) == 8
    assert sum(len(place.readers) for place in places) == 14  # every linear layer reads at one place
    queries, output, gates, down = places[:4]
    assert queries.readers == tuple(f"model.layers.0.self_attn.{one}_proj" for one in "qkv")
    assert queries.makers == ("model.layers.0.input_layernorm.weight",)
    assert output.readers == ("model.layers.0.self_attn.o_proj",)
    assert (output.heads, output.copies) == (2, 3)
    assert gates.makers == ("model.layers.0.post_attention_layernorm.weight",)
    assert down.makers == ("model.layers.0.mlp.up_proj.weight",)


def test_biases_are_scaled_with_their_rows() -> None:
    biased = {**SHAPES, "model.layers.0.self_attn.v_proj.bias": (4,), "model.layers.0.mlp.up_proj.bias": (4,)}
    output, down = found(biased)[1], found(biased)[3]
    assert output.makers == ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.v_proj.bias")
    assert down.makers == ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias")


def test_every_head_has_its_own_keys_where_none_are_named() -> None:
    assert (found(num_key_value_heads=None)[1].heads, found(num_key_value_heads=None)[1].copies) == (6, 1)


@pytest.mark.parametrize(
    ("config", "shapes", "why"),
    [
        ({"model_type": "gemma2"}, SHAPES, "not known for model_type gemma2"),
        ({"model_type": "qwen3_moe"}, SHAPES, "not known for model_type qwen3_moe"),
        ({"model_type": None}, SHAPES, "not known for model_type None"),
        ({"quantization_config": {}}, SHAPES, "quantized already"),
        ({}, {**SHAPES, "model.layers.0.input_layernorm.bias": (8,)}, "a norm with a bias"),
    ],
)
def test_models_that_are_refused(config: dict[str, Any], shapes: Shapes, why: str) -> None:
    with pytest.raises(InputError, match=why) as error:
        found(shapes, **config)
    assert error.value.hint

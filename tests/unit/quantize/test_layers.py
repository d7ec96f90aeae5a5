"""Which layers are quantized, by names and shapes; what `--ignore` may say, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.errors import InputError
from flashrl_cli.quantize.layers import FAMILIES, Junction, Shapes, choose, is_matrix, junctions
from tests.unit.quantize.models import LAYERS, QWEN2

MIXTURE = QWEN2 | {
    "model.layers.1.mlp.gate.weight": (4, 32),
    "model.layers.1.mlp.shared_expert.down_proj.weight": (32, 64),
    "model.layers.1.mlp.shared_expert_gate.weight": (1, 32),
    "model.layers.1.mlp.experts.0.down_proj.weight": (32, 64),
    "model.layers.1.mlp.experts.1.down_proj.weight": (32, 64),
    "model.layers.2.mlp.experts.gate_up_proj": (4, 32, 64),
    "model.layers.2.mlp.experts.gate_up_proj_bias": (4, 64),
}
DOWN = "model.layers.0.mlp.down_proj"


def test_linear_layers_and_nothing_else() -> None:
    choice = choose(QWEN2, [])
    assert sorted(choice.quantized) == sorted(LAYERS)
    assert choice.kept == ("lm_head",)
    assert choice.ignore == ("lm_head",)
    assert choice.odd == choice.experts == ()


def test_a_tied_head_is_named_all_the_same() -> None:
    shapes = {name: shape for name, shape in QWEN2.items() if name != "lm_head.weight"}
    assert choose(shapes, ["lm_head"]).ignore == ("lm_head",)


@pytest.mark.parametrize("entry", [DOWN, "re:.*down_proj", "re:model.layers.0.mlp.down"])
def test_names_and_patterns_leave_layers(entry: str) -> None:
    choice = choose(QWEN2, [entry])
    assert DOWN not in choice.quantized
    assert choice.kept == ("lm_head", DOWN)
    assert choice.ignore == ("lm_head", entry)


def test_a_pattern_is_matched_from_the_start_and_a_name_as_a_whole() -> None:
    with pytest.raises(InputError) as caught:
        choose(QWEN2, ["re:down_proj", DOWN.removesuffix("_proj"), "model.layers.0.mlp"])
    messages = [problem.message for problem in caught.value.problems]
    assert len(messages) == 3
    assert messages[1] == "--ignore model.layers.0.mlp.down matches no layer"
    assert caught.value.problems[1].hint == f"meant: {DOWN}"


@given(st.sampled_from(LAYERS))
def test_a_name_means_itself(module: str) -> None:
    fused = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    if module.rpartition(".")[2] in fused:
        with pytest.raises(InputError, match="vLLM joins"):
            choose(QWEN2, [module])
    else:
        assert set(LAYERS) - set(choose(QWEN2, [module]).quantized) == {module}
        assert set(choose(QWEN2, [f"re:{re.escape(module)}$"]).quantized) == set(choose(QWEN2, [module]).quantized)


def test_what_is_joined_stays_together() -> None:
    quantized = choose(QWEN2, ["re:.*self_attn.[qkv]_proj"]).quantized
    assert [name.rpartition(".")[2] for name in quantized] == ["o_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.raises(InputError, match=r"gate_proj and .*up_proj into one layer") as caught:
        choose(QWEN2, ["re:.*up_proj"])
    assert caught.value.hint == "ignore all of them or none"


def test_no_regular_expression() -> None:
    with pytest.raises(InputError, match=r"--ignore re:\*: no regular expression"):
        choose(QWEN2, ["re:*"])


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"4 matrices of experts, model\.layers\.1\.mlp\.experts\.0") as caught:
        choose(MIXTURE, [])
    assert caught.value.hint == "--ignore 're:.*experts.*' leaves them in 16 bits"


def test_experts_that_are_left_keep_their_routers() -> None:
    choice = choose(MIXTURE, ["re:.*experts.*"])
    assert set(choice.quantized) == {*LAYERS, "model.layers.1.mlp.shared_expert.down_proj"}
    assert set(choice.ignore) == {
        "lm_head", "re:.*experts.*", "model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate",
    }  # fmt: skip
    assert len(choice.experts) == 4


def test_odd_shapes_are_told() -> None:
    assert choose(QWEN2 | {f"{DOWN}.weight": (32, 68)}, []).odd == (DOWN,)


def test_nothing_to_quantize() -> None:
    for ignore in (["re:.*"], ["re:model.*"]):
        with pytest.raises(InputError, match="no linear layer"):
            choose(QWEN2, ignore)
    with pytest.raises(InputError, match="no linear layer"):
        choose({"wte.weight": (4, 4), "score.weight": (1, 4)}, [])


@pytest.mark.parametrize(
    ("name", "shape", "is_one"),
    [
        ("transformer.h.0.attn.c_proj.weight", (4, 4), True),
        ("lm_head.weight", (4, 4), True),
        ("model.embed_tokens.weight", (4, 4), False),
        ("transformer.wpe.weight", (4, 4), False),
        ("model.layers.0.norm.weight", (4,), False),
        ("model.layers.0.conv.weight", (4, 1, 4), False),
        ("model.layers.0.A_log", (4, 4), False),
        ("model.layers.0.mlp.experts.0.w1.weight", (4, 4), False),
    ],
)
def test_a_matrix(name: str, shape: tuple[int, ...], is_one: bool) -> None:
    assert is_matrix(name, shape) == is_one


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

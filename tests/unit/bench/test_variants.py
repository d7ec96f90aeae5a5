"""Kinds of rollouts as a person writes them, as vLLM is told of them, and as an engine proves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.bench.job import Variant, parse
from flashrl_cli.contract import PLAIN
from flashrl_cli.errors import InputError
from tests.unit.bench.lab import HOLDS


def test_variants_are_read_once_each_in_their_order(tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    profile.touch()
    found = parse("bf16, int8,int8+head32+kv8,bf16,int8+smooth,fp8-block+head32", profile)
    assert [one.name for one in found] == ["bf16", "int8", "int8+kv8+head32", "int8+smooth", "fp8-block+head32"]
    assert found[3].profile == profile


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("int9", "no precision 'int9'", "did you mean int8?"),
        ("bf16,", "no precision ''", "there are bf16, int8, fp8, fp8-block"),
        ("int8+kv", "no suffix 'kv'", "did you mean kv8?"),
        ("int8+xyzzy", "no suffix 'xyzzy'", "there are kv8, head32, smooth"),
        ("int8+smooth", "needs a profile", "--profile FILE"),
        ("bf16+smooth", "for int8 and fp8", "--rollout int8+smooth"),
        ("fp8-block+smooth", "for int8 and fp8", "--rollout int8+smooth"),
        ("fp8-block+kv8", "an FP8 KV cache takes flashrl's own weight update", "--rollout fp8+kv8"),
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


def test_what_vllm_and_the_plugins_are_told() -> None:
    ours = {"worker_extension_cls": "flashrl_cli.plugins.disk_refit.BenchExtension"}
    assert Variant(precision="bf16").arguments(2) == {**ours, "quantization": None}
    assert Variant(precision="bf16").options() == PLAIN
    assert Variant(precision="int8", kv8=True).arguments(2) == {
        **ours,
        "quantization": "flashrl_int8",
        "kv_cache_dtype": "fp8",
    }
    blocks = Variant(precision="fp8-block").arguments(2)
    quantization = blocks["hf_overrides"]["quantization_config"]
    assert quantization["weight_block_size"] == [128, 128]
    assert quantization["ignored_layers"] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert blocks["worker_extension_cls"] == "flashrl_cli.plugins.verl_blocks.BlocksExtension"
    options = Variant(precision="fp8", head32=True, profile=Path("/p")).options()
    assert (options.lm_head_fp32, options.profile) == (True, "/p")


def test_a_profile_is_known_by_its_content(tmp_path: Path) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    one.write_text("x")
    other.write_text("x")
    assert Variant(precision="int8", profile=one).key() == Variant(precision="int8", profile=other).key()
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
        (Variant(precision="bf16", kv8=True), {"kv_cache": "fp8_e4m3"}, None),
        (Variant(precision="bf16", kv8=True), {}, "its KV cache is auto"),
        (Variant(precision="bf16"), {"kv_cache": "fp8"}, "its KV cache is fp8"),
        (Variant(precision="bf16", head32=True), {"lm_head": "float32"}, None),
        (Variant(precision="bf16", head32=True), {}, "computed in bf16"),
        (Variant(precision="bf16"), {"lm_head": "float32"}, "computed in float32"),
        (Variant(precision="int8", profile=Path("/p")), {"precision": "int8", "smoothed": 3}, None),
        (Variant(precision="int8", profile=Path("/p")), {"precision": "int8"}, "0 of its tensors are smoothed"),
        (Variant(precision="int8"), {"precision": "int8", "smoothed": 3}, "3 of its tensors are smoothed"),
    ],
)
def test_an_engine_that_holds_something_else_is_told(
    variant: Variant, holds: dict[str, Any], problem: str | None
) -> None:
    found = variant.contradiction({**HOLDS, **holds})
    assert found is None if problem is None else found is not None and problem in found

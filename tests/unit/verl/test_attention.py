"""What `model.attention: auto` stands for, and what verl gets of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.memory.model import shape_of
from flashrl_cli.verl.attention import Use, decided, flash_lacks, of_spec, varlen_lacks
from flashrl_cli.verl.lint.keys import verbatim_key_problems
from flashrl_cli.verl.overrides import Places, overrides
from flashrl_cli.weights.shape import ModelShape, of_config
from tests.specs import load_spec

A, M = "verl.actor_rollout_ref.actor", "verl.+actor_rollout_ref.model.override_config.attn_implementation"
C = "verl.+critic.model.override_config.attn_implementation"
FP32 = f"verl.+{A.removeprefix('verl.')}.fsdp_config.mixed_precision.param_dtype=fp32"


def qwen() -> ModelShape:
    found = shape_of("Qwen/Qwen2.5-0.5B-Instruct", Path("/none"))
    assert found
    return found


PLAIN = qwen()


@pytest.mark.parametrize(
    ("preset", "sets", "installed", "policy", "value", "reason"),
    [
        ("tiny", (), True, PLAIN, "sdpa", "needs a GPU"),
        ("gsm8k-0.5b", (), False, PLAIN, "varlen", "torch's own"),
        ("gsm8k-0.5b", (), False, None, "varlen", "torch's own"),
        ("gsm8k-0.5b", (), True, PLAIN, "flash_attention_2", "is installed"),
        ("dapo-32b", (), False, PLAIN, "flash_attention_2", "sequence parallelism"),
        (
            "gsm8k-0.5b",
            ("verl.critic.fsdp.ulysses_sequence_parallel_size=2",),
            False,
            PLAIN,
            "flash_attention_2",
            "seq",
        ),
        ("gsm8k-0.5b", ("model.packing=false",), False, PLAIN, "sdpa", "packed sequences only"),
        ("gsm8k-0.5b", ("model.packing=false",), True, PLAIN, "flash_attention_2", "is installed"),
        ("gsm8k-0.5b", (FP32,), True, PLAIN, "sdpa", "not in fp32"),
        ("gsm8k-0.5b", (), True, replace(PLAIN, head_dim=512), "sdpa", "head sizes up to 256"),
        ("gsm8k-0.5b", (), False, replace(PLAIN, head_dim=20), "sdpa", "multiples of 8"),
        ("gsm8k-0.5b", (), True, replace(PLAIN, head_dim=20), "flash_attention_2", "is installed"),
        ("gsm8k-0.5b", (), False, replace(PLAIN, window=1535), "sdpa", "the model's has 1535 of 1536 tokens"),
        ("gsm8k-0.5b", (), False, replace(PLAIN, window=1536), "varlen", "torch's own"),
        ("gsm8k-0.5b", (), False, replace(PLAIN, softcap=True), "sdpa", "does not cap"),
        ("gsm8k-0.5b", ("model.attention=sdpa",), True, PLAIN, "sdpa", "--set model.attention"),
    ],
)
def test_auto(
    preset: str, sets: tuple[str, ...], installed: bool, policy: ModelShape | None, value: str, reason: str
) -> None:
    found = decided(load_spec(preset, sets=sets), installed=installed, policy=policy, critic=PLAIN)
    assert found.spec.model.attention == value
    assert reason in str(found.origins["model.attention"])
    assert decided(found, installed=not installed) == found, "what is decided stays"


def test_the_critic_counts_only_where_there_is_one() -> None:
    odd = replace(PLAIN, head_dim=20)
    for preset, value in (("gsm8k-0.5b", "sdpa"), ("gsm8k-grpo-0.5b", "varlen")):
        assert decided(load_spec(preset), installed=False, policy=PLAIN, critic=odd).spec.model.attention == value


def given(preset: str, *sets: str) -> dict[str, object]:
    resolved = decided(load_spec(preset, sets=sets), installed=False)
    places = Places(name="r", data=Path("/d"), checkpoints=Path("/c"))
    return {str(o): o.value for o in overrides(resolved, places) if o.key.endswith("attn_implementation")}


def test_policy_and_critic_get_it() -> None:
    actor, critic = M.removeprefix("verl."), C.removeprefix("verl.")
    assert set(given("gsm8k-0.5b")) == {f"{actor}=varlen", f"{critic}=varlen"}
    assert set(given("gsm8k-grpo-0.5b")) == {f"{actor}=varlen"}
    assert set(given("gsm8k-0.5b", f"{C}=eager")) == {f"{actor}=varlen", f"{critic}=eager"}
    assert of_spec(load_spec("gsm8k-0.5b", sets=[f"{C}=eager"]).spec) == {"actor": "auto", "critic": "eager"}


def test_it_is_said_once() -> None:
    resolved = load_spec("gsm8k-0.5b", sets=["model.attention=sdpa", f"{C}=eager"])
    places = Places(name="r", data=Path("/d"), checkpoints=Path("/c"))
    (problem,) = verbatim_key_problems(resolved, overrides(resolved, places))
    assert "model.attention = sdpa say it twice" in problem.message
    assert problem.hint == "drop it, or --set model.attention=auto"


def test_another_name_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        load_spec("gsm8k-0.5b", sets=["model.attention=flash"])
    (problem,) = caught.value.problems
    assert "'varlen' or 'sdpa'" in problem.message


def test_every_lack_is_named() -> None:
    use = Use(False, "fp32", 100, replace(PLAIN, head_dim=300, window=10, softcap=True))
    assert [lack.cause for lack in varlen_lacks(use)] == ["packing", "dtype", *["model"] * 4]
    assert [lack.cause for lack in flash_lacks(use)] == ["dtype", "model"]
    assert list(varlen_lacks(Use(True, "bf16", 100))) == []


CONFIG = {
    "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "vocab_size": 99, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "window", "softcap"),
    [
        ({}, None, False),
        ({"sliding_window": None}, None, False),
        ({"sliding_window": 4096}, 4096, False),
        ({"sliding_window": 32768, "use_sliding_window": False}, None, False),
        ({"sliding_window": 32768, "use_sliding_window": True}, 32768, False),
        ({"sliding_window": 512, "layer_types": ["full_attention"]}, None, False),
        ({"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]}, 512, False),
        ({"attn_logit_softcapping": 50.0}, None, True),
    ],
)
def test_windows_and_caps_of_a_model(config: dict[str, object], window: int | None, softcap: bool) -> None:
    found = of_config(CONFIG | config)
    assert (found.window, found.softcap) == (window, softcap)

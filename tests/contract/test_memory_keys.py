"""What the memory estimate reads of verl's own configuration tree, and the keys that it advises."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from flashrl_cli.config.resolve import Resolved
from flashrl_cli.memory.estimate import estimate
from flashrl_cli.memory.model import shape_of
from flashrl_cli.text import GIB
from flashrl_cli.verl import compose
from flashrl_cli.verl.config import SET_KEYS, Batch, Settings, TrainerSettings, trainer_settings
from flashrl_cli.verl.overrides import Places, overrides
from tests.specs import decided_spec

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")


@cache
def composed(*sets: str, preset: str = "dapo-32b") -> tuple[Resolved, compose.Tree]:
    resolved = decided_spec(preset, sets=sets)
    places = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))
    return resolved, compose.tree([str(override) for override in overrides(resolved, places)])


def settings(*sets: str, preset: str = "dapo-32b") -> TrainerSettings:
    resolved, tree = composed(*sets, preset=preset)
    return trainer_settings(Settings(resolved, (), tree))


def test_the_original_s_32b_run() -> None:
    found = settings()
    assert (found.world, found.length, found.bucket) == (32, 22528, 2 << 30)
    actor = found.actor
    assert (actor.strategy, actor.sequence_parallel, actor.train, actor.infer) == (
        "fsdp",
        8,
        Batch(tokens=32768),
        Batch(tokens=32768),
    )
    assert actor.param_offload
    assert actor.optimizer_offload
    assert actor.fused_kernels
    assert actor.checkpointing
    assert (found.critic, found.reference) == (None, None)
    assert (found.rollout.tensor_parallel, found.rollout.max_model_len) == (2, 22528)


def test_a_critic_has_the_budget_that_verl_uses() -> None:
    critic = settings(preset="gsm8k-0.5b").critic
    assert critic is not None
    assert critic.train == critic.infer == Batch(tokens=32768)
    assert not critic.checkpointing
    rows = settings("critic.micro_batch_size_per_gpu=4", preset="gsm8k-0.5b").critic
    assert rows is not None
    assert rows.train == Batch(tokens=4 * 1536)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("verl.actor_rollout_ref.actor.strategy=fsdp2", "strategy", "fsdp2"),
        ("verl.actor_rollout_ref.actor.fsdp_config.model_dtype=bf16", "adam_bytes", 4),
        ("verl.actor_rollout_ref.actor.optim.optimizer=AdamW8bit", "adam_bytes", 2),
        ("verl.actor_rollout_ref.model.lora_rank=32", "lora_rank", 32),
        ("verl.actor_rollout_ref.model.target_modules=[q_proj, v_proj]", "lora_targets", ("q_proj", "v_proj")),
        ("verl.+actor_rollout_ref.model.override_config.attn_implementation=sdpa", "flash_attention", False),
        ("verl.actor_rollout_ref.actor.fsdp_config.use_no_sync_for_gradient_accumulation=true", "no_sync", True),
        ("verl.actor_rollout_ref.actor.entropy_from_logits_with_chunking=true", "entropy_chunk", 2048),
        ("algorithm.entropy_coeff=0.01", "train_entropy", True),
        ("verl.+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32", "compute_bytes", 4),
    ],
)
def test_keys_of_the_actor(text: str, name: str, value: object) -> None:
    assert getattr(settings(text).actor, name) == value
    assert getattr(settings().actor, name) != value


def test_a_reference_is_a_model_of_its_own_but_under_lora() -> None:
    assert settings("algorithm.kl_loss=true").reference == Batch(tokens=32768)
    by_tokens = settings("algorithm.kl_loss=true", "rollout.log_prob_max_tokens_per_gpu=24576")
    assert by_tokens.reference == by_tokens.actor.infer == Batch(tokens=24576)
    by_responses = settings("algorithm.kl_loss=true", "algorithm.micro_batch_size_per_gpu=2")
    assert by_responses.reference == by_responses.actor.infer == Batch(sequences=2)
    assert settings("algorithm.kl_loss=true", "verl.actor_rollout_ref.model.lora_rank=8").reference is None


def test_other_engines_are_not_estimated() -> None:
    with pytest.raises(ValueError, match="for FSDP only, not for veomni"):
        settings("verl.actor_rollout_ref.actor.strategy=veomni")


@pytest.mark.parametrize("name", SET_KEYS)
def test_advice_can_be_followed(name: str) -> None:
    critic = name.startswith("critic")
    value = {"gpu_memory_utilization": "0.4", "max_num_batched_tokens": "32768"}.get(name, "4")
    if name.endswith(("offload", "offload_policy", "kernels", "checkpointing", "padding")):
        value = "true"
    key = SET_KEYS[name]
    by_responses = name in {"micro_batch", "log_prob_micro_batch"}
    given = ("algorithm.micro_batch_size_per_gpu=8",) if by_responses else ()
    before, after = (
        settings(*given, *sets, preset="gsm8k-0.5b" if critic else "dapo-32b") for sets in ((), (f"{key}={value}",))
    )
    unchanged = {"checkpointing", "fused_kernels", "optimizer_offload", "param_offload", "offload_policy"}
    unchanged.add("remove_padding")
    assert (before == after) == (name in unchanged)


def test_estimate_of_a_shipped_preset() -> None:
    resolved, tree = composed()
    shape = shape_of("Qwen/Qwen2.5-32B", Path("/nowhere"))
    assert shape is not None
    assert estimate(resolved, tree, shape, None, 80 * GIB).verdict == "fits"
    assert estimate(resolved, tree, shape, None, 40 * GIB).verdict == "over"

"""Verbatim keys that verl would take in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.config import presets
from flashrl_cli.config.resolve import load_spec
from flashrl_cli.verl.lint import keys
from flashrl_cli.verl.overrides import Places, overrides

PLACES = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))
R = "actor_rollout_ref.rollout"


def found(preset: str, *sets: str, rollout: str | None = None):
    resolved = load_spec(preset, rollout=rollout, sets=sets)
    return keys.verbatim_key_problems(resolved, overrides(resolved, PLACES))


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8-block", "int8"])
@pytest.mark.parametrize("name", presets.names())
def test_shipped_presets_break_none(name, precision):
    assert found(name, rollout=precision) == []


CASES = [
    (
        "no_forced_keys",
        "verl.++actor_rollout_ref.actor.imp_ratio=2",
        "`++` and `~`",
        "actor_rollout_ref.actor.imp_ratio",
    ),
    (
        "no_dead_keys",
        "verl.reward_model.reward_manager=dapo",
        "does not act on reward_model.reward_manager",
        "reward.manager",
    ),
    ("no_dead_keys", "verl.+reward_model.overlong_buffer.len=1", "not in verl's tree", "reward.overlong"),
    ("no_dead_keys", "verl.reward_model.enable=true", "legacy reward tree", "verl.reward.reward_model"),
    ("no_dead_keys", "verl.custom_reward_function.path=/x.py", "legacy", "verl.reward.custom_reward_function"),
    ("no_dead_keys", "verl.actor_rollout_ref.actor.imp_ratio_cap=2", "was a fork's key", "--tis CAP"),
    ("no_dead_keys", "verl.actor_rollout_ref.actor.grad_clip=1.0", "never read", "optim.clip_grad"),
    ("no_dead_keys", "verl.algorithm.filter_groups.max_num_gen_batches=10", "ignored", "max_inflight_batches"),
    (
        "no_owned_keys",
        "verl.data.train_batch_size=8",
        "sets verl's data.train_batch_size itself",
        "--set data.train_batch",
    ),
    ("no_owned_keys", "verl.trainer.experiment_name=x", "sets verl's trainer.experiment_name", "--name"),
    ("no_owned_keys", "verl.trainer.device=cuda", "itself", "--set resources.platform"),
    ("no_owned_keys", "verl.algorithm.rollout_correction.rollout_is=token", "itself", "--tis"),
    ("no_owned_keys", "verl.+actor_rollout_ref.actor.strategy=fsdp", "is set twice", "drop it"),
    ("no_owned_keys", f"verl.{R}.logprobs_mode=raw_logprobs", "is set twice", "drop it"),
    ("no_forced_keys", "verl.~trainer.val_only=1", "`++` and `~`", "verl.trainer.val_only"),
    ("no_owned_keys", "verl.trainer.v1.trainer_mode=colocate_async", "itself", "synchronous V1 trainer"),
    ("no_owned_keys", f"verl.+{R}.engine_kwargs.vllm.kv_cache_dtype=fp8", "itself", "--set rollout.kv_cache=fp8"),
    ("no_owned_keys", f"verl.+{R}.engine_kwargs.vllm.calculate_kv_scales=true", "itself", "drop it"),
    ("one_quantization", f"verl.{R}.quantization=torchao", "say it twice", "--rollout"),
    ("own_environment", "env.FLASHRL_PLUGIN_DIR=/x", "FLASHRL_PLUGIN_DIR is flashrl's own", "drop it"),
    ("own_environment", "env.VERL_FILE_LOGGER_PATH=/x", "VERL_FILE_LOGGER_PATH is flashrl's own", "drop it"),
    (
        "no_idle_options",
        "algorithm.kl_loss_coef=0.01",
        "nothing reads algorithm.kl_loss_coef without algorithm.kl_loss=true",
        "--set algorithm.kl_loss=true",
    ),
    ("no_idle_options", "critic.lr=1e-5", "nothing reads critic.lr", "--set algorithm.advantage=gae"),
    ("no_idle_options", "algorithm.filter_groups.metric=acc", "nothing reads", "algorithm.filter_groups.enable=true"),
]


@pytest.mark.parametrize(("rule", "text", "part", "hint"), CASES)
def test_broken(rule, text, part, hint):
    problem = found("tiny", text)[0]
    assert part in problem.message
    assert hint in (problem.hint or "")
    assert str(problem.where).startswith(("--set ", "presets/"))


@pytest.mark.parametrize(
    "sets",
    [
        ("algorithm.kl_loss_coef=0.01", "algorithm.kl_loss=true"),
        ("algorithm.kl_loss_coef=0",),
        ("algorithm.filter_groups.enable=false",),
        ("critic.path=null",),
    ],
)
def test_an_option_that_is_read_or_says_nothing_is_let_through(sets):
    assert found("tiny", *sets) == []


def test_a_preset_may_hold_values_for_a_switch_that_is_off():
    assert found("gsm8k-0.5b", "algorithm.advantage=grpo", "rollout.n=8") == []


def test_bypass_mode_is_refused_with_the_correction_only():
    key = "verl.algorithm.rollout_correction.bypass_mode=true"
    assert any("silently not correct" in problem.message for problem in found("tiny", key))
    assert found("tiny", key, "correction.cap=null") == []


def test_verls_own_quantizations_are_free_in_bf16_but_fp8_has_its_switch():
    assert found("dapo-32b", f"verl.{R}.quantization=torchao") == []
    assert "say it twice" in found("dapo-32b", f"verl.{R}.quantization=fp8")[0].message
    assert "say it twice" in found("dapo-32b", f"verl.+{R}.engine_kwargs.vllm.quantization=x")[0].message


def test_every_rule_has_a_case():
    named = {rule for rule, *_ in CASES} | {"no_bypass_with_correction"}
    assert {rule.__name__ for rule in keys.RULES} == named

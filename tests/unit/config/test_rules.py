"""Rules between the values of a spec: each holds for the shipped presets and catches its mistake."""

from __future__ import annotations

import shlex

import pytest

from flashrl_cli.config import presets
from flashrl_cli.config.resolve import RULES
from flashrl_cli.errors import InputError
from tests.specs import load_spec


@pytest.mark.parametrize("name", presets.names())
def test_shipped_presets_keep_all_rules(name):
    assert load_spec(name).spec.name == name


GRPO, GAE = "dapo-32b", "gsm8k-0.5b"
CASES = [
    (
        "cache_in_8_bits_has_scales",
        GRPO,
        ("rollout.precision=fp8-block", "rollout.kv_cache=fp8"),
        "fp8 needs flashrl's own weight update",
        "--set rollout.kv_cache=auto",
    ),
    (
        "mini_batch_divides_batch",
        GRPO,
        ("algorithm.mini_batch_size=513",),
        "513 is more than data.train_batch_size = 512",
        "--set algorithm.mini_batch_size=512",
    ),
    (
        "mini_batch_divides_batch",
        GRPO,
        ("algorithm.mini_batch_size=100",),
        "100 does not divide data.train_batch_size = 512",
        "--set algorithm.mini_batch_size=64",
    ),
    (
        "passes_have_one_size",
        GRPO,
        ("algorithm.micro_batch_size_per_gpu=4", "algorithm.max_tokens_per_gpu=24576"),
        "24576 tokens a pass, and algorithm.micro_batch_size_per_gpu = 4 responses",
        "--set algorithm.max_tokens_per_gpu=auto",
    ),
    (
        "passes_have_one_size",
        GRPO,
        ("rollout.log_prob_micro_batch_size_per_gpu=4", "rollout.log_prob_max_tokens_per_gpu=24576"),
        "24576 tokens a pass, and rollout.log_prob_micro_batch_size_per_gpu = 4 responses",
        "--set rollout.log_prob_micro_batch_size_per_gpu=null",
    ),
    (
        "passes_have_one_size",
        GAE,
        ("critic.micro_batch_size_per_gpu=4", "critic.max_tokens_per_gpu=8192"),
        "8192 tokens a pass, and critic.micro_batch_size_per_gpu = 4 responses",
        "--set critic.max_tokens_per_gpu=auto",
    ),
    (
        "passes_are_counted_alike",
        GRPO,
        ("rollout.log_prob_micro_batch_size_per_gpu=4",),
        "counts responses, and algorithm.max_tokens_per_gpu tokens",
        "--set rollout.log_prob_micro_batch_size_per_gpu=null",
    ),
    (
        "passes_are_counted_alike",
        GRPO,
        ("algorithm.micro_batch_size_per_gpu=4", "rollout.log_prob_max_tokens_per_gpu=24576"),
        "counts tokens, and the policy update responses",
        "--set rollout.log_prob_max_tokens_per_gpu=null",
    ),
    ("group_has_members", GRPO, ("rollout.n=1",), "GRPO needs more than one response", "--set rollout.n=8"),
    (
        "filtered_groups_vary",
        GAE,
        ("algorithm.filter_groups.enable=true",),
        "filters nothing with one response a prompt",
        "--set rollout.n=8",
    ),
    ("metrics_are_written", GRPO, ("trainer.logger=[console]",), "lacks file", "--set 'trainer.logger=[console,file]'"),
    (
        "overlong_fits",
        GRPO,
        ("reward.overlong.buffer_len=20481",),
        "20481 is more than data.max_response_length = 20480",
        "--set reward.overlong.buffer_len=20480",
    ),
    (
        "overlong_fits",
        GRPO,
        ("reward.manager=naive",),
        "manager naive does not know it",
        "--set reward.manager=dapo",
    ),
    (
        "profile_is_applied",
        GRPO,
        ("rollout.profile=/p", "rollout.precision=bf16"),
        "bf16 rollouts quantize nothing that it could smooth",
        "--set rollout.profile=null",
    ),
    (
        "profile_is_applied",
        GRPO,
        ("rollout.profile=/p", "rollout.precision=fp8-block"),
        "fp8-block rollouts take verl's own weight update",
        "--set rollout.profile=null",
    ),
    (
        "rotation_is_for_integers",
        GRPO,
        ("rollout.rotation=64", "rollout.precision=fp8"),
        "64 is not for fp8 rollouts: a rotation takes them further from the trainer (KL 0.0426 nats",
        "--set rollout.rotation=auto",
    ),
    (
        "rotation_is_for_integers",
        GRPO,
        ("rollout.rotation=64",),
        "64 is not for bf16 rollouts: they round nothing that a rotation could spread",
        "--set rollout.rotation=auto",
    ),
    (
        "profile_suits_the_basis",
        GRPO,
        ("rollout.rotation=64", "rollout.precision=int8", "rollout.profile=/p"),
        "64 mixes the channels for which rollout.profile was made",
        "--set rollout.rotation=off",
    ),
    ("dual_clip_bounds_from_above", GRPO, ("algorithm.clip_c=1",), "1 is not above 1", "--set algorithm.clip_c=3.0"),
    (
        "warmup_ends",
        GRPO,
        ("trainer.critic_warmup=1",),
        "nothing learns in the first 1 step: grpo has no critic",
        "--set trainer.critic_warmup=0",
    ),
    (
        "warmup_ends",
        GAE,
        ("trainer.critic_warmup=101", "trainer.steps=100"),
        "101 is more than trainer.steps = 100",
        "--set trainer.critic_warmup=10",
    ),
    (
        "engine_holds_a_sequence",
        GAE,
        ("rollout.max_model_len=1535",),
        "1535 is less than data.max_prompt_length + data.max_response_length = 1536",
        "--set rollout.max_model_len=1536",
    ),
    (
        "engine_batches_its_sequences",
        GAE,
        ("rollout.max_num_batched_tokens=1023",),
        "1023 is less than rollout.max_num_seqs = 1024",
        "--set rollout.max_num_seqs=1023",
    ),
    (
        "mix_has_two_precisions",
        GAE,
        ("rollout.precision=bf16", "rollout.mix=0.5"),
        "every replica is in bf16 already",
        "--set rollout.precision=int8",
    ),
    (
        "mix_has_two_precisions",
        GAE,
        ("rollout.precision=fp8-block", "rollout.mix=0.5"),
        "for all replicas alike",
        "--set rollout.precision=fp8",
    ),
    (
        "logits_are_proven",
        GAE,
        ("rollout.precision=fp8-block", "rollout.lm_head_fp32=true"),
        "do not know it",
        "--set rollout.precision=fp8",
    ),
]
LEGAL = [
    (GRPO, ("algorithm.micro_batch_size_per_gpu=4",)),
    (GRPO, ("algorithm.micro_batch_size_per_gpu=4", "rollout.log_prob_micro_batch_size_per_gpu=8")),
    (GRPO, ("algorithm.max_tokens_per_gpu=24576", "rollout.log_prob_max_tokens_per_gpu=null")),
    (GAE, ("critic.micro_batch_size_per_gpu=4",)),
    (GRPO, ("algorithm.mini_batch_size=512",)),
    (GRPO, ("rollout.n=2",)),
    (GAE, ("rollout.n=2", "algorithm.filter_groups.enable=true")),
    (GRPO, ("trainer.logger=[file]",)),
    (GRPO, ("reward.overlong.buffer_len=20480",)),
    (GRPO, ("reward.manager=naive", "reward.overlong=null")),
    (GRPO, ("algorithm.clip_c=1.01",)),
    (GAE, ("trainer.critic_warmup=100", "trainer.steps=100")),
    (GAE, ("rollout.precision=fp8-block", "rollout.mix=0")),
    (GAE, ("rollout.precision=int8", "rollout.mix=0.5", "rollout.lm_head_fp32=true")),
    (GAE, ("rollout.max_model_len=1536", "rollout.max_num_batched_tokens=1024")),
]


@pytest.mark.parametrize(("rule", "preset", "sets", "message", "hint"), CASES)
def test_broken(rule, preset, sets, message, hint):
    with pytest.raises(InputError) as caught:
        load_spec(preset, sets=sets)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert hint in (problem.hint or "")


@pytest.mark.parametrize(("rule", "preset", "sets", "message", "hint"), CASES)
def test_the_hint_fixes_it(rule, preset, sets, message, hint):
    key, _, value = shlex.split(hint)[1].partition("=")
    kept = [text for text in sets if text.partition("=")[0] != key]
    assert load_spec(preset, sets=[*kept, f"{key}={value}"]).spec


SECRETS = [
    "env.WANDB_API_KEY=abc",
    "env.HF_TOKEN=q9q9",
    "env.MY_TOKEN_FILE=sk-" + "a" * 30,
    "env.PROXY=http://me:word@proxy:8080",
    "verl.+ray_kwargs.ray_init.runtime_env.env_vars.SWANLAB_API_KEY=abc",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_refused_and_not_repeated(secret):
    key, _, value = secret.partition("=")
    with pytest.raises(InputError) as caught:
        load_spec(GAE, sets=[secret])
    (problem,) = caught.value.problems
    assert key.rpartition(".")[2] in str(problem.hint)
    assert "export" in str(problem.hint)
    assert value not in f"{problem.message}{problem.hint}".replace(key, "")


@pytest.mark.parametrize("harmless", ["TOKENIZERS_PARALLELISM=true", "MAX_TOKENS=5", "HF_HOME=/data/hf"])
def test_what_only_sounds_secret_is_let_through(harmless):
    assert load_spec(GAE, sets=[f"env.{harmless}"]).spec


@pytest.mark.parametrize(("preset", "sets"), LEGAL)
def test_what_just_holds_is_let_through(preset, sets):
    assert load_spec(preset, sets=sets).spec


def test_every_rule_has_a_case():
    by_hand = {"no_secret_is_written_down"}  # its fix is done in a shell
    assert {rule.__name__ for rule in RULES} == {rule for rule, *_ in CASES} | by_hand

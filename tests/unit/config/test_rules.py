"""Rules between the values of a spec: each holds for the shipped presets and catches its mistake."""

from __future__ import annotations

import math
import shlex

import pytest

from flashrl_cli.config import presets
from flashrl_cli.config.correction import noise
from flashrl_cli.config.resolve import RULES
from flashrl_cli.errors import InputError
from tests.specs import load_spec


@pytest.mark.parametrize("name", presets.names())
def test_shipped_presets_keep_all_rules(name):
    assert load_spec(name).spec.name == name


GRPO, GAE = "dapo-32b", "gsm8k-0.5b"


def by(what: str) -> str:
    return f"correction.reject.by={what}"


def upper(bound: float) -> str:
    return f"correction.reject.upper={bound}"


CASES = [
    (
        "shares_are_of_data_sets",
        GRPO,
        ("data.train=[gsm8k,math]", "data.shares=[1]"),
        "1 share for 2 data sets of data.train",
        "--set 'data.shares=[1.0, 1.0]'",
    ),
    (
        "shares_are_of_data_sets",
        GRPO,
        ("data.shares=[1,2]",),
        "2 shares for 1 data set of data.train",
        "--set data.shares=null",
    ),
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
    ("group_has_members", GRPO, ("rollout.n=1",), "grpo needs more than one response", "--set rollout.n=8"),
    (
        "weights_have_a_kind",
        GRPO,
        ("correction.kind=none", "correction.cap=2"),
        "2 with correction.kind = none",
        "--set correction.kind=tis",
    ),
    (
        "weights_have_a_kind",
        GRPO,
        ("correction.cap=2", "correction.lower=0.5"),
        "0.5: tis weights have no lower bound",
        "--set correction.lower=null",
    ),
    (
        "icepop_keeps_1",
        GRPO,
        ("correction.kind=icepop", "correction.cap=0.9"),
        "0.9 is below 1: icepop would zero every token on which",
        "--set correction.cap=5",
    ),
    (
        "icepop_keeps_1",
        GRPO,
        ("correction.kind=icepop", "correction.lower=6"),
        "6 is above correction.cap = 5",
        "--set correction.lower=0.5",
    ),
    (
        "icepop_keeps_1",
        GRPO,
        ("correction.kind=icepop", "correction.lower=1.1"),
        "1.1 is above 1",
        "--set correction.lower=0.5",
    ),
    (
        "icepop_is_no_geometric_mean",
        GRPO,
        ("correction.kind=icepop", "algorithm.loss=gmpo"),
        "turns one zeroed token into a zeroed response",
        "--set correction.kind=tis",
    ),
    (
        "rejection_has_bounds",
        GRPO,
        (by("seq-mean"), "correction.reject.estimator=k3", upper(0.2), "correction.reject.lower=0.1"),
        "0.1: k3 is a divergence, which has no lower bound",
        "--set correction.reject.lower=null",
    ),
    (
        "rejection_has_bounds",
        GRPO,
        (by("seq-max"), upper(2)),
        "verl takes the largest k2 or k3 of a response, not k1",
        "--set correction.reject.estimator=k3",
    ),
    (
        "rejection_has_bounds",
        GRPO,
        (by("token"), upper(2), "correction.reject.lower=3"),
        "3 is above correction.reject.upper = 2: everything would be rejected",
        "--set correction.reject.lower=null",
    ),
    (
        "rejection_has_bounds",
        GRPO,
        (by("token"), upper(0.9), "correction.reject.lower=0.5"),
        "0.9: weights of 1, where rollout and trainer agree, would be rejected",
        "--set correction.reject.upper=2",
    ),
    (
        "rejection_has_bounds",
        GRPO,
        (by("token"), upper(2), "correction.reject.lower=1.5"),
        "1.5: weights of 1, where rollout and trainer agree, would be rejected",
        "--set correction.reject.lower=null",
    ),
    *(
        (
            "rejection_leaves_rewards",
            preset,
            (*more, by("token"), upper(2)),
            "a response whose last token is rejected loses it",
            "--set correction.reject.by=seq-mean",
        )
        for preset, more in ((GAE, ()), (GRPO, ("algorithm.advantage=reinforce-plus-plus",)))
    ),
    (
        "rejection_leaves_rewards",
        GRPO,
        ("algorithm.advantage=opo", by("token"), upper(2)),
        "the baseline weights responses by their number of kept tokens",
        "--set correction.reject.by=seq-mean",
    ),
    (
        "std_is_read",
        GRPO,
        ("algorithm.advantage=grpo-vectorized", "algorithm.normalize_by_std=false"),
        "not read by grpo-vectorized",
        "--set algorithm.advantage=grpo",
    ),
    (
        "aggregation_is_read",
        GRPO,
        ("algorithm.loss=sapo", "algorithm.loss_aggregation=token-mean"),
        "token-mean is not read by sapo",
        "--set algorithm.loss_aggregation=seq-mean-token-mean",
    ),
    (
        "sequence_weights_survive",
        GAE,
        ("correction.kind=seq-tis", "rollout.precision=int8"),
        "at a KL of 0.025 nats a token, as measured with int8 rollouts, the mean weight of a response is 0.016",
        "--set correction.kind=tis",
    ),
    (
        "rejection_is_wider_than_noise",
        GAE,
        (by("seq-mean"), upper(1.001)),
        "1.001 by seq-mean k1 is tighter than the noise: at a KL of 0.001 nats a token",
        "--set correction.reject.upper=1.007",
    ),
    (
        "rejection_is_wider_than_noise",
        GAE,
        (by("seq-mean"), "correction.reject.estimator=k3", upper(0.02), "rollout.precision=int8"),
        "0.02 by seq-mean k3 is tighter than the noise: at a KL of 0.025 nats a token",
        "--set correction.reject.upper=0.075",
    ),
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
CASES += [
    (
        "reward_names_a_function",
        GRPO,
        ("reward.function=gsm8k",),
        "reward.function: 'gsm8k' does not name a reward function",
        "--set reward.function=FILE.py:NAME",
    ),
    (
        "reward_names_a_function",
        GRPO,
        ("reward.arguments.weight=2",),
        "reward.arguments: nothing reads them without reward.function",
        "--set reward.function=FILE.py:NAME",
    ),
]
CORRECTED = "correction.cap=2"
SEPARATE, COLOCATE = "trainer.mode=separate_async", "trainer.mode=colocate_async"
CASES += [
    (
        "staleness_is_corrected",
        GRPO,
        (SEPARATE, "correction.kind=none"),
        "trainer.mode: separate_async trains on responses of older policies, and nothing corrects for that",
        "--set correction.kind=tis",
    ),
    (
        "prefetched_groups_are_used",
        GRPO,
        (COLOCATE, CORRECTED, "trainer.prefetch=2.5", "trainer.max_staleness=2"),
        "trainer.max_staleness: 2 is not more than trainer.prefetch = 2.5, rounded up:",
        "--set trainer.max_staleness=4",
    ),
    (
        "prefetched_groups_are_used",
        GRPO,
        (COLOCATE, CORRECTED, "trainer.prefetch=1", "trainer.max_staleness=1"),
        "trainer.max_staleness: 1 is not more than trainer.prefetch = 1:",
        "--set trainer.max_staleness=2",
    ),
    (
        "prefetched_groups_are_used",
        GRPO,
        (COLOCATE, CORRECTED, "trainer.prefetch=0.5", "trainer.max_staleness=1"),
        "trainer.max_staleness: 1 is not more than trainer.prefetch = 0.5, rounded up:",
        "--set trainer.max_staleness=2",
    ),
    (
        "rollout_devices_are_used",
        GRPO,
        (COLOCATE, CORRECTED, "resources.rollout_gpus_per_node=2"),
        "resources.rollout_gpus_per_node: no engine uses these GPUs: in mode colocate_async",
        "--set trainer.mode=separate_async",
    ),
]
LEGAL = [
    (GRPO, (COLOCATE, CORRECTED, "trainer.max_staleness=2")),
    (GRPO, (COLOCATE, CORRECTED, "trainer.max_staleness=1", "trainer.prefetch=0")),
    (GRPO, (SEPARATE, CORRECTED, "trainer.max_staleness=1", "trainer.stale=wait")),
    (GRPO, (SEPARATE, by("token"), upper(1.2))),
    (GRPO, ("algorithm.micro_batch_size_per_gpu=4",)),
    (GRPO, ("algorithm.micro_batch_size_per_gpu=4", "rollout.log_prob_micro_batch_size_per_gpu=8")),
    (GRPO, ("algorithm.max_tokens_per_gpu=24576", "rollout.log_prob_max_tokens_per_gpu=null")),
    (GAE, ("critic.micro_batch_size_per_gpu=4",)),
    (GRPO, ("algorithm.mini_batch_size=512",)),
    (GRPO, ("rollout.n=2",)),
    (GAE, ("algorithm.advantage=reinforce-plus-plus", "rollout.n=1")),
    (GAE, ("correction.kind=seq-tis",)),
    (GAE, ("correction.kind=seq-tis", "rollout.precision=int8", "watch.max_weight_deviation=1")),
    (GRPO, ("correction.kind=icepop", "correction.cap=1", "correction.lower=1")),
    (GRPO, ("correction.kind=seq-tis", "algorithm.loss=gmpo", "data.max_response_length=512", "reward.overlong=null")),
    (GRPO, (by("token"), "correction.reject.estimator=k3", upper(1e-9))),
    (GRPO, (by("token"), upper(1.2), "correction.reject.lower=0.9")),
    (GAE, (by("seq-mean"), upper(1.007))),
    (GAE, (by("seq-sum"), "correction.reject.estimator=k2", upper(0.6))),
    (GRPO, ("algorithm.advantage=grpo-passk", "algorithm.normalize_by_std=false")),
    (GRPO, ("algorithm.loss=sapo",)),
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


@pytest.mark.parametrize(
    ("kl", "length", "cap"), [(0.001, 100, 2.0), (0.025, 100, 2.0), (0.025, 100, 8.0), (1e-4, 16, 1.0)]
)
def test_the_mean_of_truncated_weights_is_that_of_a_log_normal(kl, length, cap):
    """By adding up over a fine grid of the logarithm, whose density is written anew."""
    mean, variance = -kl * length, 2 * kl * length
    step = math.sqrt(variance) / 500
    grid = [mean + step * i for i in range(-5000, 5001)]
    density = [math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance) for x in grid]
    right = step * sum(min(math.exp(x), cap) * p for x, p in zip(grid, density, strict=True))
    assert noise("seq-sum", kl, length).truncated_mean(cap) == pytest.approx(right, rel=1e-4)
    assert noise("seq-sum", kl, length).truncated_mean(1e9) == pytest.approx(1, rel=1e-6), "E[w] = 1"

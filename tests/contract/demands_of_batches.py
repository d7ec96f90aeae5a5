"""Mistakes in batches and in the types of values."""

from __future__ import annotations

from tests.contract.demands_case import REF, A, R, case

VALUES = [
    case(
        "values_have_types",
        f"verl.{REF}.log_prob_use_dynamic_bsz=maybe",
        says="true or false",
        hint="log_prob_use_dynamic_bsz=true",
    ),
    case(
        "values_have_types",
        f"verl.{REF}.log_prob_max_token_len_per_gpu=16k",
        says="whole number, not '16k'",
        hint="without quotes",
        legal=(f"verl.{REF}.log_prob_max_token_len_per_gpu=16000", f"verl.{R}.val_kwargs.n=null"),
    ),
    case(
        "trains_with_fsdp",
        f"verl.{A}.strategy=megatron",
        says="trains with megatron",
        hint=f"{A}.strategy=fsdp2",
        legal=(f"verl.{A}.strategy=fsdp2",),
    ),
]
BATCHES = [
    case(
        "micro_batch_is_given",
        f"verl.{REF}.log_prob_use_dynamic_bsz=false",
        "algorithm.kl_loss=true",
        says=f"verl.{REF}.log_prob_micro_batch_size_per_gpu is not set",
        hint=f"verl.{REF}.log_prob_micro_batch_size_per_gpu=8",
        legal=(
            "algorithm.kl_loss=true",
            f"verl.{REF}.log_prob_use_dynamic_bsz=false",
            f"verl.{REF}.log_prob_micro_batch_size_per_gpu=4",
        ),
    ),
    case(
        "micro_batch_is_given",
        "algorithm.max_tokens_per_gpu=null",
        f"verl.{A}.ppo_micro_batch_size=16",
        says="algorithm.micro_batch_size_per_gpu is not set",
        hint="--set algorithm.micro_batch_size_per_gpu=8",
        legal=("algorithm.max_tokens_per_gpu=null", "algorithm.micro_batch_size_per_gpu=8", "algorithm.kl_loss=true"),
    ),
    case(
        "micro_batch_is_given_once",
        f"verl.{A}.ppo_micro_batch_size=16",
        "algorithm.micro_batch_size_per_gpu=4",
        says="say the same twice",
        hint=f"drop verl.{A}.ppo_micro_batch_size",
    ),
    case(
        "mini_batch_fills_processes",
        "algorithm.mini_batch_size=2",
        says="algorithm.mini_batch_size = 2 prompts x 1 responses do not split over 4",
        hint="--set algorithm.mini_batch_size=4",
        legal=("algorithm.mini_batch_size=2", "rollout.n=2"),
    ),
    case(
        "mini_batch_fills_processes",
        "verl.critic.ppo_mini_batch_size=6",
        says="verl.critic.ppo_mini_batch_size = 6",
        hint="verl.critic.ppo_mini_batch_size=4",
        legal=("verl.critic.ppo_mini_batch_size=32",),
    ),
    case(
        "mini_batch_fills_processes",
        "data.train_batch_size=6",
        "algorithm.mini_batch_size=6",
        says="= 6 prompts",
        hint="--set data.train_batch_size=8 --set algorithm.mini_batch_size=8",
        where="--set algorithm.mini_batch_size",
    ),
    case(
        "batch_fills_devices",
        "data.train_batch_size=6",
        "algorithm.mini_batch_size=2",
        "algorithm.micro_batch_size_per_gpu=1",
        says="data.train_batch_size = 6 prompts x 1 responses do not divide by 4 devices",
        hint="--set data.train_batch_size=8",
        legal=("data.train_batch_size=6", "algorithm.mini_batch_size=2"),
    ),
    case(
        "micro_batch_divides_share",
        "algorithm.micro_batch_size_per_gpu=5",
        says="does not divide the 16 responses",
        hint="--set algorithm.micro_batch_size_per_gpu=4",
        legal=("algorithm.micro_batch_size_per_gpu=16",),
    ),
    case(
        "micro_batch_divides_share",
        "rollout.log_prob_micro_batch_size_per_gpu=24",
        "algorithm.micro_batch_size_per_gpu=4",
        says="does not divide the 64 responses",
        hint="--set rollout.log_prob_micro_batch_size_per_gpu=16",
        # verl fills the batch up to what 64 of the actor and 96 of the critic divide: 384
        legal=(
            "rollout.log_prob_micro_batch_size_per_gpu=96",
            "algorithm.micro_batch_size_per_gpu=4",
            "verl.critic.ppo_mini_batch_size=96",
        ),
    ),
    case(
        "micro_batch_divides_share",
        "algorithm.kl_loss=true",
        "algorithm.micro_batch_size_per_gpu=4",
        f"verl.{REF}.log_prob_micro_batch_size_per_gpu=3",
        says="in the reference policy",
        hint=f"--set verl.{REF}.log_prob_micro_batch_size_per_gpu=2",
        where=f"--set verl.{REF}.log_prob_micro_batch_size_per_gpu",
    ),
    case(
        "token_budget_holds_a_sequence",
        "algorithm.max_tokens_per_gpu=2815",
        says="algorithm.max_tokens_per_gpu = 2815 tokens x 8 sequence-parallel devices cannot hold a sequence of 22528",
        hint="--set algorithm.max_tokens_per_gpu=2816",
        preset="dapo-32b",
        legal=("algorithm.max_tokens_per_gpu=2816",),
    ),
    case(
        "token_budget_holds_a_sequence",
        "rollout.log_prob_max_tokens_per_gpu=2815",
        says="rollout.log_prob_max_tokens_per_gpu = 2815",
        hint="--set rollout.log_prob_max_tokens_per_gpu=2816",
        preset="dapo-32b",
        legal=("rollout.log_prob_max_tokens_per_gpu=2816",),
    ),
    case(
        "token_budget_holds_a_sequence",
        "critic.max_tokens_per_gpu=1535",
        says="critic.max_tokens_per_gpu = 1535",
        hint="--set critic.max_tokens_per_gpu=1536",
        legal=("critic.max_tokens_per_gpu=1536",),
    ),
    case(
        "prompts_come_in_whole_batches",
        "verl.data.gen_batch_size=100",
        says="does not divide data.train_batch_size = 256",
        hint="verl.data.gen_batch_size=64",
        legal=("verl.data.gen_batch_size=128",),
    ),
    case(
        "prompts_come_in_whole_batches",
        "verl.data.gen_batch_size=1536",
        says="ignores data.gen_batch_size",
        hint="algorithm.filter_groups.max_inflight_batches",
        preset="dapo-32b",
        legal=("verl.data.gen_batch_size=1",),
    ),
]

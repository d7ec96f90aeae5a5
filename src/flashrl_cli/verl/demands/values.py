"""Types of verl's values: its tree takes any, and its dataclasses refuse them with a traceback, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashrl_cli.verl.demands.settings import MODEL, REF, Settings
from flashrl_cli.verl.overrides import ACTOR, CORRECTION, ROLLOUT

if TYPE_CHECKING:
    from flashrl_cli.errors import Problem

SWITCHES = (
    f"{ACTOR}.use_dynamic_bsz",
    f"{ACTOR}.fsdp_config.param_offload",
    f"{ACTOR}.fsdp_config.optimizer_offload",
    f"{ACTOR}.fsdp_config.offload_policy",
    f"{REF}.log_prob_use_dynamic_bsz",
    f"{MODEL}.use_remove_padding",
    f"{MODEL}.enable_gradient_checkpointing",
    f"{MODEL}.lora.merge",
    f"{ROLLOUT}.calculate_log_probs",
    f"{ROLLOUT}.free_cache_engine",
    f"{ROLLOUT}.log_prob_use_dynamic_bsz",
    f"{ROLLOUT}.val_kwargs.do_sample",
    f"{CORRECTION}.bypass_mode",
    "critic.enable",
    "critic.use_dynamic_bsz",
    "critic.model.use_remove_padding",
    "trainer.val_only",
)
NUMBERS = (
    f"{ACTOR}.ppo_max_token_len_per_gpu",
    f"{ACTOR}.ppo_micro_batch_size",
    f"{ACTOR}.ulysses_sequence_parallel_size",
    f"{ACTOR}.fsdp_config.fsdp_size",
    f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size",
    f"{REF}.log_prob_max_token_len_per_gpu",
    f"{REF}.log_prob_micro_batch_size_per_gpu",
    f"{MODEL}.lora_rank",
    f"{ROLLOUT}.agent.num_workers",
    f"{ROLLOUT}.data_parallel_size",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
    f"{ROLLOUT}.val_kwargs.n",
    "critic.fsdp.fsdp_size",
    "critic.fsdp.ulysses_sequence_parallel_size",
    "critic.ppo_mini_batch_size",
    "data.gen_batch_size",
    "ray_kwargs.ray_init.num_cpus",
    "ray_kwargs.ray_init.num_gpus",
    "reward.num_workers",
)
"""Keys whose values the rules of this package reckon with: true or false, and whole numbers. null is verl's own to judge."""


def values_have_types(s: Settings) -> Iterator[Problem]:
    """verl merges the tree into dataclasses when it starts (utils/config.py:60) and does sums with the rest."""
    for override in s.overrides:
        key, value = override.key, override.value
        if key in SWITCHES and not isinstance(value, bool | None):
            yield s.problem(f"verl.{key} should be true or false, not {value!r}", s.fix(key, True), key)
        elif key in NUMBERS and value is not None and s.size(key) is None:
            yield s.problem(
                f"verl.{key} should be a whole number, not {value!r}", "write a number, without quotes", key
            )

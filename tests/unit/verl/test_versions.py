"""Dead keys: the most particular entry answers."""

from __future__ import annotations

import pytest

from flashrl_cli.verl.dead_keys import DEAD_KEYS, IGNORED, REMOVED, dead_key


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("reward_model.reward_manager", "reward_model.reward_manager"),
        ("reward_model.overlong_buffer.len", "reward_model.overlong_buffer"),
        ("reward_model.model.path", "reward_model.model.path"),
        ("reward_model.model.external_lib", "reward_model"),
        ("reward_model", "reward_model"),
        ("reward_models", None),
        ("reward.reward_model.enable", None),
        ("algorithm.rollout_is_level", "algorithm.rollout_is_level"),
        ("algorithm.rollout_correction.rollout_is", None),
        ("actor_rollout_ref.actor.optim.clip_grad", None),
        ("actor_rollout_ref.actor.clip_ratio", "actor_rollout_ref.actor.clip_ratio"),
        ("actor_rollout_ref.actor.clip_ratio_low", None),
        ("actor_rollout_ref.actor.fsdp_config.qat.enable", None),
        ("actor_rollout_ref.model.lora.merge", None),
        ("critic.model.lora.merge", "critic.model.lora"),
        ("ray_init.num_cpus", "ray_init"),
    ],
)
def test_lookup(key, entry):
    dead = dead_key(key)
    assert (dead.key if dead else None) == entry


def test_every_entry_is_found_and_no_key_has_two():
    for dead in DEAD_KEYS:
        assert dead_key(dead.key) is dead


def test_every_entry_says_why_and_what_instead():
    assert all(dead.why and dead.instead for dead in DEAD_KEYS)


@pytest.mark.parametrize("table", [IGNORED, REMOVED])
def test_the_tables_are_sorted(table):
    keys = [dead.key for dead in table]
    assert keys == sorted(set(keys))

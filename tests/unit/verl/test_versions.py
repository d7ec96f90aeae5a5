"""Dead keys: the most particular entry answers."""

from __future__ import annotations

import pytest

from flashrl_cli.verl.versions import DEAD_KEYS, dead_key


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("reward_model.reward_manager", "reward_model.reward_manager"),
        ("reward_model.overlong_buffer.len", "reward_model.overlong_buffer"),
        ("reward_model.model.path", "reward_model"),
        ("reward_model", "reward_model"),
        ("reward_models", None),
        ("reward.reward_model.enable", None),
        ("actor_rollout_ref.actor.optim.clip_grad", None),
    ],
)
def test_lookup(key, entry):
    dead = dead_key(key)
    assert (dead.key if dead else None) == entry


def test_no_entry_hides_behind_an_earlier_one():
    for index, dead in enumerate(DEAD_KEYS):
        assert dead_key(dead.key) is DEAD_KEYS[index]

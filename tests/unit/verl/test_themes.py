"""Overrides by theme."""

from __future__ import annotations

from pathlib import Path

from flashrl_cli.config import presets
from flashrl_cli.config.layers import DEFAULT
from flashrl_cli.verl.overrides import Override, Places, by_theme, overrides
from tests.specs import load_spec

PLACES = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))


def test_every_override_has_one_theme():
    for name in presets.names():
        given = overrides(load_spec(name, tis="2"), PLACES)
        grouped = by_theme(given)
        assert sorted(map(str, given)) == sorted(str(o) for group in grouped.values() for o in group)
        assert all(grouped.values())


def test_the_most_particular_theme_has_a_key():
    keys = [
        "ray_kwargs.ray_init.num_cpus",
        "reward.num_workers",
        "reward_model.enable",
        "algorithm.rollout_correction.rollout_is",
        "algorithm.adv_estimator",
        "actor_rollout_ref.rollout.logprobs_mode",
        "actor_rollout_ref.rollout.n",
        "data.val_files",
    ]
    grouped = by_theme([Override(key, 1, DEFAULT) for key in keys])
    assert {theme: [o.key for o in group] for theme, group in grouped.items()} == {
        "data": ["data.val_files"],
        "importance sampling": ["algorithm.rollout_correction.rollout_is", "actor_rollout_ref.rollout.logprobs_mode"],
        "algorithm": ["algorithm.adv_estimator"],
        "rollout": ["actor_rollout_ref.rollout.n"],
        "reward": ["reward.num_workers"],
        "machine": ["ray_kwargs.ray_init.num_cpus", "reward_model.enable"],
    }

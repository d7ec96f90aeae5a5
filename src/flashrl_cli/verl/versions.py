"""Keys that verl 0.9.1 accepts (or once accepted) and does not act on, with the name that lives.

Paths are verl's. A key here is an error in a run of flashrl's: verl itself says nothing.
"""

from __future__ import annotations

from typing import NamedTuple


class DeadKey(NamedTuple):
    """A key, or the start of keys, that does nothing; what to write instead, and how it is known."""

    key: str
    instead: str
    why: str

    def covers(self, key: str) -> bool:
        """Whether `key` is this one or lies below it."""
        return key == self.key or key.startswith(f"{self.key}.")


_LEGACY = "the legacy reward tree is read by the fully-async trainer only"

DEAD_KEYS = (
    DeadKey("reward_model.reward_manager", "reward.manager", _LEGACY),
    DeadKey("reward_model.overlong_buffer", "reward.overlong.{buffer_len,penalty_factor,log}", "not in verl's tree"),
    DeadKey("reward_model", "verl.reward.reward_model.*", _LEGACY),
    DeadKey("custom_reward_function", "verl.reward.custom_reward_function.*", _LEGACY),
    DeadKey("sandbox_fusion", "verl.reward.sandbox_fusion.*", _LEGACY),
    DeadKey("actor_rollout_ref.actor.imp_ratio_cap", "correction.cap, or --tis CAP", "was a fork's key"),
    DeadKey("algorithm.rollout_is", "correction.cap, or --tis CAP", "is now in algorithm.rollout_correction"),
    DeadKey("algorithm.rollout_is_threshold", "correction.cap, or --tis CAP", "is now in algorithm.rollout_correction"),
    DeadKey(
        "actor_rollout_ref.actor.grad_clip",
        "verl.actor_rollout_ref.actor.optim.clip_grad",
        "never read (workers/engine/fsdp/transformer_impl.py:795)",
    ),
    DeadKey(
        "critic.grad_clip", "verl.critic.optim.clip_grad", "never read (workers/engine/fsdp/transformer_impl.py:795)"
    ),
    DeadKey("critic.model.fsdp_config", "verl.critic.fsdp.*", "moved"),
    DeadKey(
        "algorithm.filter_groups.max_num_gen_batches",
        "algorithm.filter_groups.max_inflight_batches",
        "ignored by the V1 trainer (trainer/ppo/v1/trainer_base.py:205)",
    ),
)


def dead_key(key: str) -> DeadKey | None:
    """The entry for a key of verl's that does nothing; the most particular one, None for a living key."""
    return next((dead for dead in DEAD_KEYS if dead.covers(key)), None)

"""verl's synchronous replay buffer with a shorter poll interval.

Stock verl 0.9.1 sleeps 2 s between polls of its queue (verl/trainer/ppo/v1/replay_buffer.py:144). That is negligible
beside minutes of generation, but most of a step of the small default run on a CPU. The class is used through verl's
hook `trainer.v1.sampler.custom_sampler`, which does not support dynamic sampling (`algorithm.filter_groups`).
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

POLL_INTERVAL_S = 0.05


class QuickReplayBuffer(ReplayBuffer):
    """verl's replay buffer with a poll interval of 0.05 s."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(poll_interval=POLL_INTERVAL_S, **kwargs)

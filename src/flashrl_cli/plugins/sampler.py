"""verl's synchronous replay buffer, asking for finished rollouts more often.

Stock verl 0.9.1 sleeps 2 s between looks at its queue (verl/trainer/ppo/v1/replay_buffer.py:144), which is nothing
beside minutes of generation and most of a step of the small default on a CPU. Used through verl's own hook
`trainer.v1.sampler.custom_sampler`, which does not serve dynamic sampling (`algorithm.filter_groups`).
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

POLL_INTERVAL_S = 0.05


class QuickReplayBuffer(ReplayBuffer):
    """verl's replay buffer with a poll interval of 0.05 s."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(poll_interval=POLL_INTERVAL_S, **kwargs)

"""verl's replay buffer, which asks its queue more often whether the responses are complete.

Stock verl 0.9.1 sleeps 2 s between two looks (verl/trainer/ppo/v1/replay_buffer.py:144, :409). On average a step waits
a second for nothing, which is much of a step with short responses. Here the pause is a share of the time that was
waited already, so that long rollouts are asked no more often than by stock verl. verl builds the buffer through its
hook `trainer.v1.sampler.custom_sampler`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

LEAST_S = 0.05
SHARE = 0.04
"""The pause between two looks, as a share of the time since the first; a look takes 10 ms for 1,000 responses."""


def quick_buffer(*, refill_fn: Callable[[int], int], **_: Any) -> Any:
    """The replay buffer that verl builds without the hook, with shorter pauses.

    verl does not give a custom sampler the settings of dynamic sampling (verl/trainer/ppo/v1/trainer_base.py:163), so
    the trainer, of which `refill_fn` is a method, builds its own buffer. No other hook of verl's gets the trainer, so
    it is also here that the trainer is made to log what arrives of weight updates, and that `samples` gets it.
    """
    from flashrl_cli.plugins import samples, staleness
    from flashrl_cli.plugins.arrival import log_arrival

    trainer: Any = refill_fn.__self__  # type: ignore[attr-defined]
    hook = trainer.config.trainer.v1.sampler.custom_sampler
    path = hook.path
    hook.path = None
    try:
        buffer = trainer._build_replay_buffer()
    finally:
        hook.path = path
    buffer.__class__ = _with_short_pauses(type(buffer))
    log_arrival(trainer)
    samples.remember(trainer)
    staleness.watch(trainer)
    return buffer


def pause(waited: float, longest: float) -> float:
    """Seconds to sleep after `waited` seconds, at most `longest`."""
    return min(max(SHARE * waited, LEAST_S), longest)


def _with_short_pauses(base: Any) -> Any:
    class QuickReplayBuffer(base):
        """A replay buffer of verl's with shorter pauses."""

        _since = 0.0
        poll_interval: float

        def sample(self, *args: Any, **kwargs: Any) -> Any:
            self._since = time.monotonic()
            return super().sample(*args, **kwargs)

        def _wait_for_next_poll(self, *args: Any, **kwargs: Any) -> float:
            longest: float = self.poll_interval
            self.poll_interval = pause(time.monotonic() - self._since, longest)
            try:
                debugged: float = super()._wait_for_next_poll(*args, **kwargs)
            finally:
                self.poll_interval = longest
            return debugged

    return QuickReplayBuffer

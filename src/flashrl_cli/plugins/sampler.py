"""verl's replay buffer, which asks its queue more often whether responses are complete, and four corrections of it.

Stock verl 0.9.1 sleeps 2 s between two looks (verl/trainer/ppo/v1/replay_buffer.py:144, :409). On average a step waits
a second for nothing, which is much of a step with short responses. Here the pause is a share of the time that was
waited already, so that long rollouts are asked no more often than by stock verl. verl builds the buffer through its
hook `trainer.v1.sampler.custom_sampler`.

Four things go wrong in stock verl's asynchronous modes. A failed group is replaced by another one without end
(:583), so that a run whose every response fails would never end; in mode sync it ends. And a checkpoint is written
before the batch that was trained on leaves the queue (trainer_base.py:485, :511), so that these responses stay in the
queue of a resumed run, and in all its checkpoints, for ever. Groups that were submitted in the same step are taken in
the order of a set (:388), which differs from process to process, so that a resumed run makes other mini-batches of
them. And where older checkpoints are removed, only the folders of the models are
(verl/utils/checkpoint/checkpoint_manager.py:158): the queue of each saved step, gigabytes with long responses, stays.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LEAST_S = 0.05
TRAIN = "train"
"""verl's partition of the queue with what is trained on."""
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
    buffer.__class__ = quick(type(buffer))
    buffer._batch = trainer.config.data.train_batch_size
    log_arrival(trainer)
    samples.remember(trainer)
    staleness.watch(trainer)
    remove_lone_queues(trainer)
    return buffer


def pause(waited: float, longest: float) -> float:
    """Seconds to sleep after `waited` seconds, at most `longest`."""
    return min(max(SHARE * waited, LEAST_S), longest)


def remove_lone_queues(trainer: Any) -> None:
    """Let an asynchronous trainer remove the saved queues of steps whose policy verl has removed (idempotent).

    Nothing is removed where the step that was just saved has no policy, as on a disk that the nodes do not share.
    """
    base: Any = type(trainer)
    if trainer.trainer_mode == "sync" or getattr(base, "_flashrl_queues", False):
        return

    class Saving(base):
        """A trainer of verl's whose saved steps have a queue only beside a policy."""

        _flashrl_queues = True

        def _save_checkpoint(self) -> None:
            super()._save_checkpoint()
            steps = Path(self.config.trainer.default_local_dir)
            if (steps / f"global_step_{self.global_steps}" / "actor").is_dir():
                for queue in steps.glob("global_step_*/transfer_queue"):
                    if not (queue.parent / "actor").is_dir():
                        shutil.rmtree(queue, ignore_errors=True)

    trainer.__class__ = Saving


_Base: Any = object


class Quick(_Base):
    """What is added to a replay buffer of verl's."""

    _batch = 1
    """Prompts of a step."""
    _since = 0.0
    _finished = 0
    """Most groups that were finished at a time since the last one failed in vain."""
    _failed = 0
    """Groups that failed since more were finished."""
    _looked = False
    poll_interval: float

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        self._since = time.monotonic()
        self._finished = self._failed = 0
        return super().sample(*args, **kwargs)

    def _wait_for_next_poll(self, *args: Any, **kwargs: Any) -> float:
        longest: float = self.poll_interval
        self.poll_interval = pause(time.monotonic() - self._since, longest)
        try:
            debugged: float = super()._wait_for_next_poll(*args, **kwargs)
        finally:
            self.poll_interval = longest
        return debugged

    def _evict_terminal_groups(self, global_steps: int, partition_id: str, reasons: Any) -> Any:
        """Raise RuntimeError once a batch of groups has failed in a row."""
        finished = len(self.finished_keys[partition_id])
        self._failed = 0 if finished > self._finished else self._failed + len(reasons[2])
        self._finished = max(self._finished, finished)
        if self._failed >= self._batch:
            raise RuntimeError(f"{self._failed} groups of responses have failed in a row, and no other is finished")
        return super()._evict_terminal_groups(global_steps, partition_id, reasons)

    def _select_prompt_uids(self, partition_id: str, keys: Iterable[str], batch_size: int) -> Any:
        return super()._select_prompt_uids(partition_id, sorted(keys), batch_size)

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()
        if not self._looked:
            self._looked = True
            self._forget_trained()

    def _forget_trained(self) -> None:
        """Clear the responses whose prompt is not in the queue; before the first step these were trained on."""
        import transfer_queue

        left = [key for key in self.partitions[TRAIN] if key.split("_")[0] not in self.prompt_global_steps[TRAIN]]
        if left:
            transfer_queue.kv_clear(partition_id=TRAIN, keys=left)
        for key in left:
            del self.partitions[TRAIN][key]


def quick(base: type) -> type:
    """A class of verl's replay buffers with what `Quick` changes."""
    return type(f"Quick{base.__name__}", (Quick, base), {})

"""How long verl's trainer pauses before it asks for finished responses again, and when it gives up."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.plugins.sampler import TRAIN, pause, quick, remove_lone_queues


def test_pauses_grow_with_the_wait_between_their_bounds() -> None:
    assert [pause(waited, 2.0) for waited in (0.0, 1.0, 10.0, 25.0, 1000.0)] == [0.05, 0.05, 0.4, 1.0, 2.0]
    assert pause(0.0, 0.01) == 0.01


class Base:
    """As much of verl's buffer as the quick one builds on."""

    def __init__(self) -> None:
        self.finished_keys: Any = defaultdict(set)
        self.partitions: Any = defaultdict(dict)
        self.prompt_global_steps: Any = defaultdict(dict)

    def sample(self) -> None:
        pass

    def _evict_terminal_groups(self, *_: Any) -> str:
        return "evicted"

    def _select_prompt_uids(self, _: str, keys: Any, batch_size: int) -> list[str]:
        return sorted(keys, key=len)[:batch_size]

    def _sync_metadata_from_transfer_queue(self) -> None:
        self.partitions[TRAIN] = {"a_0_0": {}, "a_1_0": {}, "b_0_0": {}}
        self.prompt_global_steps[TRAIN] = {"b": 2, "c": 3}


def test_a_batch_of_failures_in_a_row_is_enough() -> None:
    buffer = quick(Base)()
    buffer._batch = 4

    def evict(failed: int, finished: int) -> str:
        buffer.finished_keys[TRAIN] = set(range(finished))
        return str(buffer._evict_terminal_groups(1, TRAIN, (set(), set(), set(range(failed)), {})))

    assert [evict(3, 0), evict(1, 1), evict(2, 1)] == ["evicted"] * 3, "one was finished between them"
    buffer.sample()
    assert [evict(9, 1), evict(9, 2)] == ["evicted"] * 2, "between two looks others were finished"
    assert [evict(0, 2), evict(3, 2)] == ["evicted"] * 2
    with pytest.raises(RuntimeError, match="4 groups of responses have failed in a row"):
        evict(1, 2)


def test_responses_that_a_checkpoint_kept_too_long_are_cleared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[Any] = []
    queue = SimpleNamespace(kv_clear=lambda *, partition_id, keys: cleared.append((partition_id, keys)))
    monkeypatch.setitem(sys.modules, "transfer_queue", queue)
    buffer = quick(Base)()
    buffer._sync_metadata_from_transfer_queue()
    assert cleared == [(TRAIN, ["a_0_0", "a_1_0"])]
    assert list(buffer.partitions[TRAIN]) == ["b_0_0"]
    buffer._sync_metadata_from_transfer_queue()
    assert len(cleared) == 1, "later, such responses are those that are being trained on"


def test_groups_of_one_step_are_taken_in_the_same_order_by_every_process() -> None:
    keys = {f"{letter}{number}" for letter in "abc" for number in range(9)} | {"z"}
    assert quick(Base)()._select_prompt_uids(TRAIN, keys, 4) == ["z", "a0", "a1", "a2"]


@pytest.mark.parametrize(("saved", "left"), [(("actor", "transfer_queue"), {2, 3}), (("transfer_queue",), {1, 2, 3})])
def test_a_saved_queue_goes_with_its_policy(tmp_path: Path, saved: tuple[str, ...], left: set[int]) -> None:
    """Step 1 has lost its policy; step 3 is the one that is saved, on a disk that has policies or not."""

    class Trainer:
        trainer_mode, global_steps = "separate_async", 3
        config = SimpleNamespace(trainer=SimpleNamespace(default_local_dir=str(tmp_path)))

        def _save_checkpoint(self) -> None:
            for name in saved:
                (tmp_path / "global_step_3" / name).mkdir(parents=True)

    (tmp_path / "global_step_1/transfer_queue").mkdir(parents=True)
    for name in ("actor", "transfer_queue"):
        (tmp_path / "global_step_2" / name).mkdir(parents=True)
    trainer = Trainer()
    remove_lone_queues(trainer)
    remove_lone_queues(trainer)
    trainer._save_checkpoint()
    assert {number for number in (1, 2, 3) if (tmp_path / f"global_step_{number}/transfer_queue").is_dir()} == left

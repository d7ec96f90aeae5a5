"""Items that are handled together, and rows that are stored together."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.plugins import agent_loop
from flashrl_cli.plugins.agent_loop import Puts, Together, scores_padded


class Work:
    """Notes its calls, which end when they are let go."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self._go = asyncio.Event()

    async def __call__(self, kind: str, items: list[int]) -> list[int]:
        self.calls.append((kind, items))
        await self._go.wait()
        if 13 in items:
            raise ValueError("13")
        return [-item for item in items]

    def let_go(self) -> None:
        self._go.set()


async def some_turns() -> None:
    """Let other coroutines run until all of them wait."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_items_that_arrive_meanwhile_go_into_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_loop, "LONGEST_WAIT_S", 3600.0)

    async def main() -> None:
        work = Work()
        together = Together(work)
        first = asyncio.gather(*(together("a", item) for item in (1, 2)))
        await some_turns()
        later = asyncio.gather(together("a", 3), together("b", 4), together("a", 5))
        await some_turns()
        assert work.calls == [("a", [1, 2]), ("b", [4])]
        work.let_go()
        assert [*await first, *await later] == [-1, -2, -3, -4, -5]
        assert work.calls[2:] == [("a", [3, 5])]

    asyncio.run(main())


def test_free_calls_take_equal_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_loop, "LONGEST_WAIT_S", 3600.0)

    async def main() -> None:
        work = Work()
        together = Together(work, calls=3)
        all_ = asyncio.gather(*(together("a", item) for item in range(7)))
        await some_turns()
        assert [items for _, items in work.calls] == [[0, 1, 2], [3, 4], [5, 6]]
        work.let_go()
        assert await all_ == [-item for item in range(7)]

    asyncio.run(main())


def test_no_item_waits_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_loop, "LONGEST_WAIT_S", 0.01)

    async def main() -> None:
        work = Work()
        together = Together(work)
        all_ = [asyncio.ensure_future(together("a", 1))]
        await some_turns()
        for begun in (2, 3):
            all_ += [asyncio.ensure_future(together("a", item)) for item in (10 * begun, 10 * begun + 1)]
            while len(work.calls) < begun:
                await asyncio.sleep(0.001)
        assert work.calls == [("a", [1]), ("a", [20, 21]), ("a", [30, 31])]
        work.let_go()
        assert await asyncio.gather(*all_) == [-1, -20, -21, -30, -31]

    asyncio.run(main())


def test_only_the_item_with_an_error_fails() -> None:
    async def main() -> None:
        work = Work()
        work.let_go()
        together = Together(work)
        found = await asyncio.gather(*(together("a", item) for item in (12, 13, 14)), return_exceptions=True)
        assert found[::2] == [-12, -14]
        assert isinstance(found[1], ValueError)

    asyncio.run(main())


class Queue:
    """TransferQueue, as far as the workers use it; rows are stacked to a list of their values."""

    def __init__(self) -> None:
        self.puts: list[dict[str, Any]] = []

    async def async_kv_batch_put(self, **put: Any) -> None:
        self.puts.append(put)


class Tensor:
    def __init__(self, *shape: int, dtype: str = "int64") -> None:
        self.shape, self.dtype = shape, dtype


def test_rows_of_one_layout_are_stored_by_one_put() -> None:
    """Only the first dimension of what is stacked may be ragged: the positions of images [4, tokens] are not."""

    async def main() -> None:
        queue = Queue()
        puts = Puts(queue, lambda rows: [len(rows)])
        short, long, wide = {"ids": Tensor(2)}, {"ids": Tensor(3)}, {"ids": Tensor(4, 3)}
        narrow, other = {"ids": Tensor(4, 2)}, {"ids": Tensor(2, dtype="float32")}
        await asyncio.gather(
            puts.async_kv_batch_put(keys=["a"], fields=[short], tags=[{"n": 1}], partition_id="train"),
            puts.async_kv_batch_put(keys=["b", "c"], fields=[long, wide], tags=[{}, {}], partition_id="train"),
            puts.async_kv_batch_put(keys=["d"], fields=[narrow], tags=[{}], partition_id="train"),
            puts.async_kv_batch_put(keys=["e"], fields=[other], tags=[{}], partition_id="train"),
            puts.async_kv_batch_put(keys=["f"], fields=[short], tags=[{}], partition_id="val"),
            puts.async_kv_put(key="uid", partition_id="train", tag={"status": "running"}),
        )
        found = sorted((put["partition_id"], put["keys"], put.get("fields"), put["tags"]) for put in queue.puts)
        assert found == [
            ("train", ["a", "b"], [2], [{"n": 1}, {}]),
            ("train", ["c"], [1], [{}]),
            ("train", ["d"], [1], [{}]),
            ("train", ["e"], [1], [{}]),
            ("train", ["uid"], None, [{"status": "running"}]),
            ("val", ["f"], [1], [{}]),
        ]
        assert puts.puts is queue.puts

    asyncio.run(main())


@pytest.mark.parametrize(
    ("manager", "model", "function", "padded"),
    [
        (("register", "naive"), False, None, True),
        (("register", "dapo"), False, "reward.py", True),
        (("register", "dapo"), True, "reward.py", True),
        (("register", "gdpo"), True, None, False),
        (("register", "rate_limited"), False, None, False),
        (("importlib", "naive"), False, None, False),
    ],
)
def test_only_known_reward_managers_get_several_responses(
    manager: tuple[str, str], model: bool, function: str | None, padded: bool
) -> None:
    """A reward model judges a row as it is, unless a function of the user's calls it."""
    reward = SimpleNamespace(
        reward_manager=SimpleNamespace(source=manager[0], name=manager[1]),
        reward_model=SimpleNamespace(enable=model),
        custom_reward_function=SimpleNamespace(path=function),
    )
    assert scores_padded(SimpleNamespace(reward=reward)) is padded

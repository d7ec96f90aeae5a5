"""A checkpoint engine over gloo: weight updates from the trainer to rollout workers on other devices, without NCCL.

verl 0.9.1 sends weights between devices by NCCL, NIXL, Mooncake or the like, none of which a machine without GPUs has
(verl/checkpoint_engine/__init__.py). It imports this module through its hook
`actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module` in every process that takes part.

Rank 0 of the trainer packs tensors into buckets and broadcasts each of them to all rollout workers: two sizes, a header
in JSON, and the bytes. Nothing that arrives is executed. Each update has a group of its own, so that no worker can be
in the middle of another one; whoever waits longer than `timeout_s` for the others raises RuntimeError.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from verl.checkpoint_engine.base import (
    CheckpointEngine,
    CheckpointEngineRegistry,
    TensorMeta,
    merge_weight_chunks,
    split_weight_chunks,
)
from verl.utils.net_utils import get_free_port

from flashrl_cli.contract import CHECKPOINT_ENGINE

ALIGNMENT = 16
"""Bytes: each tensor in a bucket begins at a multiple, so that its bytes can be read as numbers of any dtype."""
OUTSIDE = -1
"""Rank of the trainer's other processes, which gather weights with rank 0 and send none."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32,
                  torch.int8, torch.uint8, torch.bool)
}  # fmt: skip


@CheckpointEngineRegistry.register(CHECKPOINT_ENGINE[0])
class GlooCheckpointEngine(CheckpointEngine):
    """One process's side of weight updates; `bucket_size` is in bytes, and a process has two buckets."""

    def __init__(self, bucket_size: int, is_master: bool = False, timeout_s: float = 300) -> None:
        self.bucket_size, self.is_master = bucket_size, is_master
        self.timeout = timedelta(seconds=timeout_s)
        self.rank = OUTSIDE
        self._store: dist.TCPStore | None = None
        self._address: tuple[str, int] | None = None
        self._update = 0
        self._group: Any = None
        self._buckets: tuple[torch.Tensor, ...] = ()

    def prepare(self) -> tuple[str, int, int] | None:
        """Address of the store where the processes find each other, and the number of this update; None if not here."""
        if not self.is_master:
            return None
        if self._store is None or self._address is None:
            host = _host()
            port, _ = get_free_port(host)
            self._address = host, port
            self._store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=self.timeout)
        self._update += 1
        return *self._address, self._update

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Arguments of `init_process_group` for each trainer process and each rollout worker, in their order."""

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {
                "rank": ranks,
                "world_size": [1 + rollout_world_size] * len(ranks),
                "meeting": [metadata[0]] * len(ranks),
            }

        others = [OUTSIDE] * (actor_wg_world_size - 1)
        return arguments([0, *others]), arguments(list(range(1, 1 + rollout_world_size)))

    def init_process_group(self, rank: int, world_size: int, meeting: tuple[str, int, int]) -> None:
        """Join the group of this update; returns when all have joined."""
        self.rank = rank
        if rank == OUTSIDE:
            return
        host, port, update = meeting
        if self._store is None:
            self._store = dist.TCPStore(host, port, is_master=False, timeout=self.timeout)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = self.timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_host())]
        self._group = dist.ProcessGroupGloo(dist.PrefixStore(str(update), self._store), rank, world_size, options)
        self._buckets = tuple(torch.empty(self.bucket_size, dtype=torch.uint8) for _ in range(2))

    def finalize(self) -> None:
        """Leave the group and free the buckets."""
        self._group, self._buckets = None, ()

    @torch.no_grad()
    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, Any]:
        """Broadcast all weights. The next bucket is filled while one is on its way."""
        if self.rank == OUTSIDE:
            for _ in weights:
                pass
            return {}
        header: list[list[Any]] = []
        held, turn = 0, 0
        sending: asyncio.Future[None] | None = None

        async def send(last: bool) -> None:
            nonlocal header, held, turn, sending
            if sending:
                await sending
            text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
            sizes = torch.tensor([len(text), held, last])
            parts = (sizes, text, self._buckets[turn][:held])
            sending = asyncio.get_running_loop().run_in_executor(None, self._broadcast, parts)
            header, held, turn = [], 0, 1 - turn

        async for meta, chunk in split_weight_chunks(weights, self.bucket_size):
            start = -(-held // ALIGNMENT) * ALIGNMENT
            if start + meta.chunk_size > self.bucket_size:
                await send(last=False)
                start = 0
            self._buckets[turn][start : start + meta.chunk_size].copy_(chunk)
            header.append(_described(meta, start))
            held = start + meta.chunk_size
        await send(last=True)
        if sending:
            await sending
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Yield each weight, on the CPU. It must be copied before the next one is asked for."""
        async for pair in merge_weight_chunks(self._chunks(), self.bucket_size):
            yield pair

    async def _chunks(self) -> AsyncGenerator[tuple[TensorMeta, torch.Tensor], None]:
        """Yield the chunks of all buckets; the next bucket arrives while the chunks of one are used."""
        loop = asyncio.get_running_loop()
        last, turn = False, 0
        arriving = loop.run_in_executor(None, self._receive, self._buckets[turn])
        while not last:
            header, last = await arriving
            bucket, turn = self._buckets[turn], 1 - turn
            if not last:
                arriving = loop.run_in_executor(None, self._receive, self._buckets[turn])
            for meta in _read(header, self.bucket_size):
                yield meta, bucket[meta.offset : meta.offset + meta.chunk_size]

    def _receive(self, bucket: torch.Tensor) -> tuple[bytes, bool]:
        """Fill a bucket; returns its header, and whether it is the last one."""
        sizes = torch.empty(3, dtype=torch.int64)
        self._broadcast((sizes,))
        length, held, last = sizes.tolist()
        if not (0 <= length < 1 << 30 and 0 <= held <= len(bucket)):
            raise RuntimeError(f"a bucket of {held} bytes with a header of {length} is none of this weight update")
        text = torch.empty(length, dtype=torch.uint8)
        self._broadcast((text, bucket[:held]))
        return text.numpy().tobytes(), bool(last)

    def _broadcast(self, parts: Iterable[torch.Tensor]) -> None:
        """Send tensors from rank 0, or fill them, one after another. Raises RuntimeError if a process is gone."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = self.timeout
        for part in parts:
            if part.numel():
                self._group.broadcast([part], options).wait()


def _host() -> str:
    """Address at which the other nodes of Ray's cluster reach this one."""
    return str(ray.util.get_node_ip_address()).strip("[]")


def _described(meta: TensorMeta, offset: int) -> list[Any]:
    """A chunk of a tensor, at `offset` of its bucket, as it is sent."""
    dtype = str(meta.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise TypeError(f"{meta.name} is in {dtype}, of which flashrl sends no weights")
    return [meta.name, dtype, list(meta.shape), meta.chunk_offset, meta.chunk_size, offset]


def _read(header: bytes, bucket_size: int) -> Iterator[TensorMeta]:
    """Yield the chunks that a bucket's header describes. Raises RuntimeError for one outside of the bucket."""
    for name, dtype, shape, chunk_offset, chunk_size, offset in json.loads(header):
        if not 0 <= offset <= offset + chunk_size <= bucket_size:
            raise RuntimeError(f"{name}: {chunk_size} bytes at {offset} are not within a bucket of {bucket_size}")
        yield TensorMeta(
            name=str(name),
            shape=torch.Size(shape),
            dtype=DTYPES[dtype],
            chunk_offset=chunk_offset,
            chunk_size=chunk_size,
            offset=offset,
        )

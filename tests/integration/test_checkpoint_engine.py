"""Weight updates over gloo, between threads that stand for a trainer's processes and rollout workers.

Also what verl's mode separate_async does with weights that it saves for later, on a machine without GPUs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing verl warns of much that is not ours."""
BUCKET = 1 << 10
TRAINERS, WORKERS = 2, 2
ENDS_S = 60.0
"""Far more than a failed update may take here, with any number of other processes."""


@pytest.fixture(autouse=True)
def _reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashrl_cli.plugins.checkpoint_engine._host", lambda: "127.0.0.1")


def engines(timeout_s: float = 60) -> list[Any]:
    """As verl makes them: the trainer's, of which the first is the master, then the rollout workers'."""
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    import flashrl_cli.plugins.checkpoint_engine  # noqa: F401  (as verl's hook does)

    masters = (True, *[False] * (TRAINERS - 1 + WORKERS))
    made = [
        CheckpointEngineRegistry.new("gloo", bucket_size=BUCKET, is_master=master, timeout_s=timeout_s)
        for master in masters
    ]
    return list(made)


def at_once(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Results of all jobs, or the exceptions that they raised."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
        return [future.exception() or future.result() for future in futures]


def join(group: list[Any], present: list[int] | None = None) -> list[Any]:
    """Let engines join the group of an update, as verl's manager does; the absent ones do not come."""
    metadata = [engine.prepare() for engine in group]
    actors, rollouts = type(group[0]).build_topology(TRAINERS, WORKERS, metadata)
    arguments = [
        {name: values[at] for name, values in side.items()}
        for side, size in ((actors, TRAINERS), (rollouts, WORKERS))
        for at in range(size)
    ]
    chosen = range(len(group)) if present is None else present
    return at_once([partial(group[at].init_process_group, **arguments[at]) for at in chosen])


async def received(engine: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() async for name, tensor in engine.receive_weights(global_steps=1)}


def update(group: list[Any], weights: dict[str, torch.Tensor]) -> list[Any]:
    """One weight update: nothing of the trainer's, what arrived from the others."""
    assert join(group) == [None] * len(group)

    def sent(engine: Any) -> Any:
        return asyncio.run(engine.send_weights(iter(weights.items())))

    def taken(engine: Any) -> Any:
        return asyncio.run(received(engine))

    jobs: list[Callable[[], Any]] = [partial(sent, engine) for engine in group[:TRAINERS]]
    jobs += [partial(taken, engine) for engine in group[TRAINERS:]]
    found = at_once(jobs)
    for engine in group:
        engine.finalize()
    return found


def bits(tensor: torch.Tensor) -> bytes:
    import torch

    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_every_worker_gets_every_bit() -> None:
    """Tensors of several dtypes and odd sizes, of which some share a bucket, one fills it and one needs several."""
    import torch

    group = engines()
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            "fills": torch.randn(BUCKET // 4, generator=generator),
            "odd": torch.randint(-128, 127, (3, 7), dtype=torch.int8, generator=generator),
            "scalar": torch.randn((), generator=generator),
            "half": torch.randn(5, 11, generator=generator).bfloat16(),
            "large": torch.randn(BUCKET, 3, generator=generator),
            "flags": torch.rand(9, generator=generator) < 0.5,
            "last": torch.randn(2, generator=generator).to(torch.float8_e4m3fn),
        }
        found = update(group, weights)
        assert found[:TRAINERS] == [{}] * TRAINERS
        for worker in found[TRAINERS:]:
            assert list(worker) == list(weights)
            for name, tensor in weights.items():
                assert worker[name].dtype == tensor.dtype
                assert worker[name].shape == tensor.shape
                assert bits(worker[name]) == bits(tensor), name


def test_an_update_without_weights_ends() -> None:
    assert update(engines(), {})[TRAINERS:] == [{}] * WORKERS


def test_nothing_waits_for_a_worker_that_never_comes() -> None:
    begun = time.monotonic()
    group = engines(timeout_s=2)
    found = join(group, present=[0, 1, 2])
    assert found[1] is None, "the trainer's other processes wait for nobody"
    assert all(isinstance(found[at], RuntimeError) for at in (0, 2))
    assert time.monotonic() - begun < ENDS_S


def test_nothing_waits_for_a_worker_that_is_gone() -> None:
    """One of two workers leaves after the first bucket; the trainer must not believe that it got everything."""
    import torch

    weights = {str(number): torch.full((BUCKET // 4,), float(number)) for number in range(50)}
    group = engines(timeout_s=5)
    assert join(group) == [None] * len(group)

    async def leave(engine: Any) -> None:
        async for _ in engine.receive_weights():
            break
        engine.finalize()

    begun = time.monotonic()
    found = at_once(
        [
            lambda: asyncio.run(group[0].send_weights(iter(weights.items()))),
            lambda: asyncio.run(received(group[2])),
            lambda: asyncio.run(leave(group[3])),
        ]
    )
    assert isinstance(found[0], RuntimeError)
    assert time.monotonic() - begun < ENDS_S


def test_a_header_from_elsewhere_is_refused() -> None:
    from flashrl_cli.plugins.checkpoint_engine import _read

    good = ["w", "float32", [4], 0, 16, 1008]
    assert next(_read(json.dumps([good]).encode(), BUCKET)).offset == 1008
    for place, value in ((4, 17), (4, -1), (5, -16)):
        wrong = [value if at == place else item for at, item in enumerate(good)]
        with pytest.raises(RuntimeError, match="are not within a bucket"):
            list(_read(json.dumps([wrong]).encode(), BUCKET))


def test_weights_of_an_unknown_dtype_are_not_sent() -> None:
    import torch

    group = engines(timeout_s=2)
    assert join(group) == [None] * len(group)
    with pytest.raises(TypeError, match="w is in complex64"):
        asyncio.run(group[0].send_weights(iter({"w": torch.zeros(2, dtype=torch.complex64)}.items())))


def test_the_address_is_one_that_other_nodes_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.undo()
    from flashrl_cli.plugins.checkpoint_engine import _host

    assert socket.getaddrinfo(_host(), None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "[fd00::1]")
    assert _host() == "fd00::1"


def test_saved_weights_do_not_change_with_the_parameters(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The sequence of verl's trainer from the second mini-batch on: save, take the first ones, go back to one's own.

    `moves` is what offloading does in between: the parameters are in new memory. By verl's own function the first
    weights become the later ones, or the later ones are lost.
    """
    import torch
    import torch.distributed as dist
    import verl.utils.fsdp_utils as verls
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from flashrl_cli.plugins.separate import copy_saved_weights

    monkeypatch.setattr(verls, "fsdp2_sharded_save_to_cpu", verls.fsdp2_sharded_save_to_cpu)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = torch.nn.Sequential(torch.nn.Linear(8, 4))
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))

        def weights() -> Any:
            return next(module.parameters()).full_tensor().detach().clone()

        def after_two_mini_batches(*, moves: bool) -> tuple[Any, Any, Any]:
            """The weights before, those for the old log-probs of the second mini-batch, and those that it trains."""
            before, first = weights(), verls.fsdp2_sharded_save_to_cpu(module)
            if moves:
                module._apply(lambda tensor: tensor.clone())  # as module.to(device)
            with torch.no_grad():
                next(module.parameters()).add_(1.0)
            second = verls.fsdp2_sharded_save_to_cpu(module)
            verls.fsdp2_sharded_load_from_cpu(module, *first)
            old = weights()
            if moves:
                module._apply(lambda tensor: tensor.clone())  # as module.to(device)
            verls.fsdp2_sharded_load_from_cpu(module, *second)
            return before, old, weights()

        before, old, own = after_two_mini_batches(moves=False)
        assert torch.equal(old, own), "verl has this fault no longer: the correction can go"
        assert not torch.equal(own, before)
        before, old, own = after_two_mini_batches(moves=True)
        assert torch.equal(own, before), "verl has this fault no longer: the correction can go"
        copy_saved_weights()
        copy_saved_weights()
        for moves in (False, True):
            before, old, own = after_two_mini_batches(moves=moves)
            assert torch.equal(old, before)
            assert torch.allclose(own, before + 1)
    finally:
        dist.destroy_process_group()


def test_verls_logger_takes_flush(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from flashrl_cli.plugins import separate

    logger = logging.getLogger(separate.TRAINER)
    caplog.set_level(logging.INFO, logger.name)
    monkeypatch.setattr(logger, "info", logger.info)
    with pytest.raises(TypeError):
        logger.info("served by %s", "two", flush=True)  # type: ignore[call-arg]
    separate.accept_flush()
    separate.accept_flush()
    logger.info("served by %s", "two", flush=True)  # type: ignore[call-arg]
    assert caplog.messages == ["served by two"]

"""The rollout phase: fewer messages, with the same tokens, log-probs and reasons to stop as vLLM's own; and verl's
replay buffer, which is asked more often.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli import contract
from tests.integration.conftest import PATIENCE_S, Workshop

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing verl and vLLM warns of much that is not ours."""
ENGINE = Path(__file__).with_name("engine_outputs.py")
INTERVALS = (1, 4, 16, 1000)
PROMPTS = [[49, 43, 50, 61], [53, 53, 43, 49, 61], [57, 43, 57, 61]]


def test_answers_are_those_of_an_engine_that_sends_every_token(workshop: Workshop, tmp_path: Path) -> None:
    job = {
        "model": str(workshop.root / "data" / "tiny" / "model"),
        "out": str(tmp_path / "out.json"),
        "intervals": INTERVALS,
        "prompts": PROMPTS,
    }
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    env = {**os.environ, **contract.ENGINE, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env[contract.ENV_PLUGIN_DIR] = str(tmp_path)
    argv = [sys.executable, str(ENGINE), str(tmp_path / "job.json")]
    done = subprocess.run(argv, check=False, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-4000:]
    every, *fewer = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    ends = [one["ended"] for one in every["answers"]]
    assert {type(reason) for _, reason in ends} == {type(None), int, str}
    assert {ended for ended, _ in ends} == {"length", "stop"}
    assert all(len(one["logprobs"]) in {0, len(one["tokens"])} for one in every["answers"])
    tokens = sum(len(one["tokens"]) for one in every["answers"])
    assert every["messages"] >= tokens
    for found in fewer:
        assert found["answers"] == every["answers"]
        assert found["messages"] < every["messages"] / 2


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's module with the rollout server, as it was before once the test is over."""
    from flashrl_cli.plugins import cpu

    monkeypatch.setattr(importlib.metadata, "version", importlib.metadata.version)
    cpu.answer_vllm_version()
    from verl.workers.rollout.vllm_rollout import vllm_async_server

    monkeypatch.setattr(vllm_async_server, "SamplingParams", vllm_async_server.SamplingParams)
    return vllm_async_server


def test_the_server_asks_for_ids_unless_it_must_find_strings(
    server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flashrl_cli.plugins import outputs, vllm_plugin

    plain = server.SamplingParams(max_tokens=8, logprobs=0)
    assert (plain.detokenize, plain.flat_logprobs) == (True, False)
    monkeypatch.setenv(contract.ENV_PLUGIN_DIR, str(tmp_path))
    monkeypatch.setattr(outputs, "ENGINE", "not of this test")
    vllm_plugin.register()
    made = server.SamplingParams
    outputs.ask_for_ids()
    assert server.SamplingParams is made
    settings = {"temperature": 1.0, "top_p": 0.9, "top_k": -1, "logprobs": 0, "repetition_penalty": 1.0}
    asked = made(max_tokens=8, ignore_eos=False, seed=3, **settings)
    assert (asked.detokenize, asked.flat_logprobs, asked.logprobs, asked.seed) == (False, True, 0, 3)
    assert made(max_tokens=8, stop=["</answer>"]).detokenize
    assert made(max_tokens=8, detokenize=True).detokenize
    monkeypatch.setattr(outputs, "VERL", "0.9.2")
    with pytest.raises(RuntimeError, match=r"verl 0\.9\.2 only"):
        outputs.ask_for_ids()


def test_tokens_of_a_request_that_the_engine_aborts_are_sent_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does before a weight update that does not wait for the responses."""
    import numpy as np
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.outputs import LogprobsLists

    from flashrl_cli.plugins import outputs

    monkeypatch.setattr(EngineCoreProc, "_send_finish_outputs_to_client", EngineCoreProc._send_finish_outputs_to_client)
    steps: Iterator[dict[int, Any]] = iter(())
    monkeypatch.setattr(Scheduler, "update_from_output", lambda *_: next(steps))
    outputs.keep_tokens()
    outputs.keep_tokens()

    def step(token: int, **more: Any) -> dict[int, Any]:
        logprobs = LogprobsLists(np.array([[token]]), np.array([[-0.5]]), np.array([1]))
        return {0: EngineCoreOutputs(outputs=[EngineCoreOutput("a", [token], new_logprobs=logprobs, **more)])}

    from vllm.v1.metrics.stats import PrefillStats

    steps = iter([step(1, prefill_stats=PrefillStats()), step(2), step(3)])
    sampling = SimpleNamespace(stop=[])
    scheduler: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(stream_interval=8),
        requests={"a": SimpleNamespace(sampling_params=sampling)},
    )
    sent = [Scheduler.update_from_output(scheduler) for _ in range(3)]
    assert [[output.new_token_ids for output in message[0].outputs] for message in sent[:1]] == [[[1]]]
    assert sent[1:] == [{}, {}]
    engine: Any = SimpleNamespace(scheduler=scheduler, output_queue=queue.Queue())
    for _ in range(2):
        EngineCoreProc._send_finish_outputs_to_client(engine, ["a"], 0, FinishReason.ABORT)
    tokens, *ends = [engine.output_queue.get_nowait()[1].outputs[0] for _ in range(3)]
    assert (tokens.new_token_ids, tokens.finish_reason) == ([2, 3], None)
    assert tokens.new_logprobs.logprob_token_ids.tolist() == [[2], [3]]
    assert [(end.new_token_ids, end.finish_reason) for end in ends] == [([], FinishReason.ABORT)] * 2


def test_the_server_keeps_what_a_weight_update_returns(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the trainer adds it to the metrics of the step."""
    import asyncio

    import ray
    from vllm.v1.engine.async_llm import AsyncLLM

    from flashrl_cli.plugins import arrival

    async def answer(self: AsyncLLM, method: str, **_: Any) -> list[Any]:
        return [{"codes_changed": 0.5}] if method == arrival.UPDATE else ["another method's"]

    monkeypatch.setattr(AsyncLLM, "collective_rpc", answer)
    arrival.keep_answers()
    kept = AsyncLLM.collective_rpc
    arrival.keep_answers()
    assert AsyncLLM.collective_rpc is kept
    holder: Any = object.__new__(server.vLLMHttpServer)
    holder.engine = object.__new__(AsyncLLM)
    monkeypatch.setattr(AsyncLLM, "__del__", lambda _: None)
    assert arrival.answers(holder) == []
    for method in (arrival.UPDATE, "reset_prefix_cache"):
        asyncio.run(holder.collective_rpc(method))
    assert arrival.answers(holder) == [{"codes_changed": 0.5}]

    class Trainer:
        def _consume_sync_metrics(self) -> dict[str, float]:
            return {"perf/sync": 1.0}

    trainer: Any = Trainer()
    call = SimpleNamespace(remote=lambda function: function(holder))
    replica = SimpleNamespace(server_handle=SimpleNamespace(__ray_call__=call))
    manager = SimpleNamespace(get_replicas=lambda: [replica])
    trainer._rollout_server_managers = lambda: [manager, manager]
    monkeypatch.setattr(ray, "get", list)
    arrival.log_arrival(trainer)
    arrival.log_arrival(trainer)
    assert trainer._consume_sync_metrics() == {"perf/sync": 1.0, "refit/codes_changed": 0.5}
    monkeypatch.setattr(arrival, "VERL", "0.9.2")
    with pytest.raises(RuntimeError, match=r"verl 0\.9\.2 only"):
        arrival.log_arrival(trainer)


@pytest.mark.parametrize("filters", [False, True])
def test_the_trainer_gets_its_own_buffer_with_shorter_pauses(monkeypatch: pytest.MonkeyPatch, filters: bool) -> None:
    from verl.trainer.ppo.v1 import replay_buffer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from flashrl_cli.verl import compose

    path, name = contract.SAMPLER
    trainer: Any = object.__new__(PPOTrainerSync)
    trainer.trainer_mode = "sync"
    trainer.config = compose.tree(
        [
            f"algorithm.filter_groups.enable={filters}",
            "algorithm.filter_groups.metric=acc",
            "algorithm.filter_groups.max_inflight_gen_batches=3",
            "data.train_batch_size=8",
            f"trainer.v1.sampler.custom_sampler.path='{path}'",
            f"trainer.v1.sampler.custom_sampler.name={name}",
        ]
    )._config
    buffer = trainer._build_replay_buffer()
    assert isinstance(buffer, replay_buffer.ReplayBuffer)
    assert trainer.config.trainer.v1.sampler.custom_sampler.path == path
    assert type(trainer)._consume_sync_metrics is not PPOTrainerSync._consume_sync_metrics
    found = (buffer.filter_groups_metric, buffer.max_inflight_gen_batches, buffer.train_batch_size)
    assert found == (("acc", 3, 8) if filters else (None, 1, 8))

    pauses: list[float] = []
    waited = iter((0.0, 0.0, 3.0, 1000.0))
    clock = SimpleNamespace(sleep=pauses.append, time=time.time)
    monkeypatch.setattr(replay_buffer, "time", clock)
    monkeypatch.setattr("flashrl_cli.plugins.sampler.time.monotonic", lambda: next(waited))

    def looks() -> None:
        if len(pauses) == 3:
            raise StopIteration

    monkeypatch.setattr(buffer, "_sync_metadata_from_transfer_queue", looks)
    with pytest.raises(StopIteration):
        buffer.sample(global_steps=1, partition_id="train", batch_size=8)
    assert pauses == [0.05, 0.12, 2.0]
    assert buffer.poll_interval == 2.0


def test_processes_of_an_engine_on_a_cpu_sleep_until_a_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import zmq
    from vllm.distributed.device_communicators import shm_broadcast

    from flashrl_cli.plugins import outputs

    def busy() -> None:
        raise AssertionError("a reader waits in a busy loop")

    condition = shm_broadcast.SpinCondition
    monkeypatch.setattr(condition, "wait", condition.wait)
    monkeypatch.setattr(shm_broadcast, "sched_yield", busy)
    outputs.sleep_between_messages()
    outputs.sleep_between_messages()
    with zmq.Context() as context:
        address = f"ipc://{tmp_path}/notify"
        writer, reader = (condition(is_reader, context, address) for is_reader in (False, True))
        try:
            while not reader.poller.poll(10):  # until it has subscribed
                writer.notify()
            monkeypatch.setattr(outputs, "LONGEST_SLEEP_MS", 3_600_000)
            reader.record_read()
            reader.wait()
            monkeypatch.setattr(outputs, "LONGEST_SLEEP_MS", 1)
            for _ in range(3):  # notifications that arrived meanwhile, and none
                reader.record_read()
                reader.wait(timeout_ms=3_600_000)
            reader.last_read -= 2 * reader.busy_loop_s
            reader.wait(timeout_ms=1)
        finally:
            for socket in (
                writer.local_notify_socket,
                reader.local_notify_socket,
                reader.write_cancel_socket,
                reader.read_cancel_socket,
            ):
                socket.close(linger=0)


def test_sleeping_needs_a_version_that_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from flashrl_cli.plugins import outputs

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(RuntimeError, match="vLLM"):
        outputs.sleep_between_messages()

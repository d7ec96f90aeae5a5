from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flashrl_cli.memory import parts
from flashrl_cli.memory.model import shape_of
from flashrl_cli.memory.parts import GIB
from flashrl_cli.verl.config import RolloutSettings, TrainerSettings
from flashrl_cli.weights.shape import ModelShape, parameters

H200_BYTES = 143_771 << 20
MEASURED = {"bf16": (61.0, 279_000), "int8": (32.2, 396_000)}
"""Weights in GiB and KV tokens that vLLM 0.24.0 reported for Qwen2.5-32B on one H200."""


@pytest.mark.parametrize("precision", MEASURED)
def test_32b_on_an_h200_is_what_vllm_reported(
    precision: str, settings: TrainerSettings, rollout: RolloutSettings
) -> None:
    shape = shape_of("Qwen/Qwen2.5-32B", Path("/nowhere"))
    assert shape is not None
    measured = replace(rollout, precision=precision, gpu_memory_utilization=0.93, max_num_batched_tokens=16384)
    engine = parts.engine(shape, replace(settings, rollout=measured), H200_BYTES)
    gib, tokens = MEASURED[precision]
    assert engine.weights / GIB == pytest.approx(gib, rel=0.02)
    assert engine.kv_tokens == pytest.approx(tokens, rel=0.05)


def test_a_token_s_keys_and_values(shape: ModelShape, rollout: RolloutSettings) -> None:
    assert parts.kv_bytes(shape, rollout) == 2 * 28 * 4 * 128 * 2
    assert parts.kv_bytes(shape, replace(rollout, tensor_parallel=2)) == 2 * 28 * 2 * 128 * 2
    assert parts.kv_bytes(shape, replace(rollout, tensor_parallel=8)) == 2 * 28 * 1 * 128 * 2
    assert parts.kv_bytes(shape, replace(rollout, kv_bytes=1)) == 2 * 28 * 4 * 128


def test_parts_fill_the_budget(shape: ModelShape, settings: TrainerSettings) -> None:
    engine = parts.engine(shape, settings, 80 * GIB)
    assert engine.weights + engine.working + engine.kv == engine.budget == 40 * GIB
    assert engine.kv_tokens == pytest.approx(engine.kv / engine.kv_bytes_per_token, abs=16)
    assert engine.wanted_tokens == 128 * 4096
    small = parts.engine(shape, replace(settings, train_batch=1, n=1), 80 * GIB)
    assert small.wanted_tokens == 4096


def test_an_engine_without_room_holds_no_token(shape: ModelShape, settings: TrainerSettings) -> None:
    assert parts.engine(shape, settings, 16 * GIB).kv_tokens == 0


def test_precisions_of_experts() -> None:
    shape = shape_of("Qwen/Qwen3-30B-A3B", Path("/nowhere"))
    assert shape is not None
    counts = parameters(shape)
    bf16, int8, fp8, blocks = (parts.weights(shape, name) for name in ("bf16", "int8", "fp8", "fp8-block"))
    assert bf16 == 2 * counts.total
    assert bf16 - int8 == pytest.approx(counts.linear, rel=0.01)
    assert fp8 == int8
    assert bf16 - blocks == pytest.approx(counts.linear + counts.experts, rel=0.01)


def test_graphs_cost_memory(shape: ModelShape, rollout: RolloutSettings) -> None:
    eager = replace(rollout, eager=True)
    assert parts.working(shape, rollout) - parts.working(shape, eager) == parts.graphs(shape, rollout) > 0
    many = replace(rollout, max_num_seqs=4096, max_num_batched_tokens=512)
    assert parts.working(shape, many) > 4096 * shape.vocab * 4

"""A run that the tests of the estimate vary: GRPO of a 7B policy on eight GPUs, no key unusual."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.memory.model import shape_of
from flashrl_cli.verl.config import Batch, EngineSettings, RolloutSettings, TrainerSettings
from flashrl_cli.weights.shape import ModelShape


@pytest.fixture
def shape() -> ModelShape:
    found = shape_of("Qwen/Qwen2.5-7B", Path("/nowhere"))
    assert found is not None
    return found


@pytest.fixture
def rollout() -> RolloutSettings:
    return RolloutSettings(
        precision="bf16",
        tensor_parallel=1,
        gpu_memory_utilization=0.5,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len=4096,
    )


@pytest.fixture
def engine() -> EngineSettings:
    return EngineSettings(train=Batch(sequences=2), infer=Batch(sequences=2))


@pytest.fixture
def settings(engine: EngineSettings, rollout: RolloutSettings) -> TrainerSettings:
    return TrainerSettings(
        nodes=1,
        gpus_per_node=8,
        prompt=1024,
        response=3072,
        train_batch=128,
        mini_batch=32,
        n=8,
        temperature=1.0,
        actor=engine,
        critic=None,
        reference=None,
        rollout=rollout,
        bucket=2 << 30,
    )

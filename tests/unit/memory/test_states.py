from __future__ import annotations

from dataclasses import replace

import pytest

from flashrl_cli.memory.parts import adapter_parameters, gathered, kept_gradients, model_of, resident, total
from flashrl_cli.verl.config import EngineSettings
from flashrl_cli.weights.shape import ModelShape, parameters


def test_sixteen_bytes_a_parameter_over_all_gpus(shape: ModelShape, engine: EngineSettings) -> None:
    items = resident(model_of(shape, engine, 8), "actor", training=True)
    assert total(items) == pytest.approx(16 * parameters(shape).total / 8)
    assert {part.name for part in items} == {"actor parameters", "actor Adam", "actor gradients"}


@pytest.mark.parametrize(("size", "shards"), [(-1, 8), (4, 4), (8, 8), (16, 8)])
def test_fsdp_size(size: int, shards: int, shape: ModelShape, engine: EngineSettings) -> None:
    assert model_of(shape, replace(engine, fsdp_size=size), 8).shards == shards


def test_offloaded_states_are_there_while_they_train(shape: ModelShape, engine: EngineSettings) -> None:
    model = model_of(shape, replace(engine, param_offload=True, optimizer_offload=True), 8)
    assert resident(model, "actor") == ()
    assert [part.name for part in resident(model, "actor", loaded=True)] == ["actor parameters"]
    assert len(resident(model, "actor", training=True)) == 3
    kept = model_of(shape, replace(engine, offload_policy=True), 8)
    assert resident(kept, "actor", training=True) == ()


def test_an_adapter_is_all_that_lora_trains(shape: ModelShape, engine: EngineSettings) -> None:
    count = adapter_parameters(shape, 32, None)
    assert count == 80_740_352  # what PEFT prints for Qwen2.5-7B, rank 32, all linear layers
    assert adapter_parameters(shape, 32, ("q_proj",)) == 28 * 32 * (3584 + 3584)
    model = model_of(shape, replace(engine, lora_rank=32), 1)
    assert model.grads == 4 * count
    assert model.params == 4 * (parameters(shape).total + count)


def test_a_critic_has_no_head(shape: ModelShape, engine: EngineSettings) -> None:
    policy, critic = model_of(shape, engine, 1), model_of(shape, engine, 1, critic=True)
    assert policy.total - critic.total == 152064 * 3584
    tied = replace(shape, tied=True)
    assert model_of(tied, engine, 1).total == model_of(tied, engine, 1, critic=True).total


def test_what_fsdp_gathers(shape: ModelShape, engine: EngineSettings) -> None:
    first = gathered(model_of(shape, engine, 8))
    second = gathered(model_of(shape, replace(engine, strategy="fsdp2"), 8))
    whole = gathered(model_of(shape, replace(engine, reshard=False), 8))
    assert second < first < whole == 2 * parameters(shape).total


def test_deferred_gradients_are_whole(shape: ModelShape, engine: EngineSettings) -> None:
    assert kept_gradients(model_of(shape, engine, 8)) == 0
    deferred = replace(engine, no_sync=True)
    assert kept_gradients(model_of(shape, deferred, 8)) == 2 * parameters(shape).total
    assert kept_gradients(model_of(shape, replace(deferred, strategy="fsdp2"), 8)) == 4 * parameters(shape).total

"""The parts of a GPU's memory: states, passes and the engine, each compared with arithmetic or a measurement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flashrl_cli.contract import LOG_PROBS_CHUNK
from flashrl_cli.memory import parts
from flashrl_cli.memory.model import shape_of
from flashrl_cli.memory.parts import Load, adapter_parameters, gathered, kept_gradients, model_of, resident, total
from flashrl_cli.text import GIB
from flashrl_cli.verl.config import Batch, EngineSettings, RolloutSettings, TrainerSettings
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


V = 152064


def test_tokens_of_a_pass(settings: TrainerSettings, engine: EngineSettings) -> None:
    def count(batch: Batch, prompts: int = 32, parallel: int = 1) -> int:
        load = parts.tokens(batch, settings, replace(engine, sequence_parallel=parallel), prompts)
        assert load.real == load.computed
        return load.computed

    assert count(Batch(sequences=2)) == 8192
    assert count(Batch(tokens=16384)) == 16384
    assert count(Batch(tokens=1024)) == 4096  # a sequence is never cut
    assert count(Batch(sequences=64), prompts=8) == 8 * 4096  # there are no more
    assert count(Batch(sequences=2), parallel=4) == 2048
    assert count(Batch(tokens=4096), parallel=4) == 4096


@pytest.mark.parametrize(
    ("mean_share", "computed", "real"),
    [(1.0, 16384, 16384), (0.5, 32768, 16384), (0.25, 65536, 16384), (0.1, 32 * 4096, 13107), (0.3, 43691, 13107)],
)
def test_padding_outgrows_the_budget(
    mean_share: float, computed: int, real: int, settings: TrainerSettings, engine: EngineSettings
) -> None:
    padded = replace(engine, remove_padding=False)
    load = parts.tokens(Batch(tokens=16384), replace(settings, mean_share=mean_share), padded, 32)
    assert (load.computed, load.real) == (computed, real)
    assert parts.tokens(Batch(sequences=2), settings, padded, 32) == parts.Load(8192, 8192)


def test_a_layer_saves_what_autograd_was_seen_to_save(shape: ModelShape) -> None:
    """57,408 bytes a token and layer of Qwen2.5-0.5B, counted with saved_tensors_hooks (Transformers 5.10, sdpa)."""
    small = replace(shape, hidden=896, heads=14, kv_heads=2, head_dim=64, intermediate=4864)
    assert parts.layer_activations(small, 2) == pytest.approx(57_408, rel=0.01)


def test_checkpointing_keeps_the_inputs_of_layers(shape: ModelShape, engine: EngineSettings) -> None:
    load = Load(1000, 800)
    assert parts.saved(shape, engine, load).bytes == 1000 * 28 * 3584 * 2
    assert parts.saved(shape, replace(engine, activation_offload=True), load).bytes == 1000 * 2 * 3584 * 2
    assert parts.saved(shape, replace(engine, checkpointing=False), load).bytes > 25 * 1000 * 28 * 3584 * 2


@pytest.mark.parametrize(
    ("changes", "temperature", "factor"),
    [
        ({}, 1.0, 2),
        ({}, 0.7, 4),
        ({"remove_padding": False}, 1.0, 6),
        ({"train_entropy": True}, 1.0, 4),
        ({"train_entropy": True, "compiled": False}, 1.0, 14),
        ({"compute_bytes": 4}, 1.0, 4),
    ],
)
def test_logits_in_training(
    changes: dict[str, object], temperature: float, factor: int, shape: ModelShape, engine: EngineSettings
) -> None:
    item = parts.train_logits(
        shape,
        replace(engine, **changes),  # type: ignore[arg-type]
        Load(1000, 1000),
        temperature,
    )
    assert item.bytes == 1000 * V * factor


CHUNK = 2 * LOG_PROBS_CHUNK / 1000 / V
"""The temporaries of a chunk in bytes a logit."""


@pytest.mark.parametrize(
    ("changes", "temperature", "update", "forward"),
    [
        ({}, 1.0, 2 + CHUNK, 2 + CHUNK),
        ({}, 0.7, 4 + CHUNK, 4 + CHUNK),
        ({"remove_padding": False}, 1.0, 4 + 0.6 * 2 + CHUNK, 2 + 0.6 * 2 + CHUNK),
        ({"remove_padding": False}, 0.7, 4 + 0.6 * 2 + CHUNK, 4 + 0.6 * 2 + CHUNK),
        ({"train_entropy": True}, 1.0, 6 + CHUNK, 2 + CHUNK),
        ({"train_entropy": True}, 0.7, 6 + CHUNK, 4 + CHUNK),
        ({"train_entropy": True, "compiled": False}, 1.0, 6 + CHUNK, 2 + CHUNK),
        ({"train_entropy": True, "remove_padding": False}, 1.0, 6 + CHUNK, 2 + 0.6 * 2 + CHUNK),
    ],
)
def test_logits_without_flash_attention(
    changes: dict[str, object],
    temperature: float,
    update: float,
    forward: float,
    shape: ModelShape,
    engine: EngineSettings,
) -> None:
    """Bytes a logit by which the peak of a process grew with verl's engine on a CPU (docs/memory-model.md)."""
    chunked = replace(engine, flash_attention=False, **changes)  # type: ignore[arg-type]
    load = Load(1000, 1000 if chunked.remove_padding else 600)
    trained = parts.train_logits(shape, chunked, load, temperature)
    inferred = parts.infer_logits(shape, chunked, load, temperature, entropy=chunked.train_entropy)
    assert (trained.bytes, inferred.bytes) == (round(1000 * V * update), round(1000 * V * forward))


def test_chunks_are_no_larger_than_the_logits(shape: ModelShape, engine: EngineSettings) -> None:
    chunked = replace(engine, flash_attention=False)
    assert parts.train_logits(shape, chunked, Load(10, 10), 1.0).bytes == 10 * V * (2 + 2 * 4)


def test_padding_is_dropped_before_log_probs(shape: ModelShape, engine: EngineSettings) -> None:
    padded = replace(engine, remove_padding=False, flash_attention=False)
    item = parts.train_logits(shape, padded, Load(1000, 600), 1.0)
    assert item.formula == f"1,000 tokens x {V:,} x 4 B + 600 x {V:,} x 2 B + 2 x 128 MiB"


def test_fused_logits_do_not_grow_with_the_pass(shape: ModelShape, engine: EngineSettings) -> None:
    fused = replace(engine, fused_kernels=True)
    small, large = Load(8192, 8192), Load(65536, 65536)
    assert parts.train_logits(shape, fused, small, 1.0) == parts.train_logits(shape, fused, large, 1.0)
    assert parts.infer_logits(shape, fused, small, 1.0, entropy=True).bytes == 512 * V * parts.FUSED_FORWARD


def test_entropy_of_old_log_probs(shape: ModelShape, engine: EngineSettings) -> None:
    def factor(entropy: bool = True, **changes: object) -> float:
        changed = replace(engine, **changes)  # type: ignore[arg-type]
        return parts.infer_logits(shape, changed, Load(8192, 8192), 1.0, entropy=entropy).bytes / 8192 / V

    assert factor() == 2
    assert factor(compiled=False) == 14
    assert factor(compiled=False, compute_bytes=4) == 12  # nothing to cast
    assert factor(compiled=False, entropy_chunk=2048) == 5
    assert factor(remove_padding=False) == 14
    assert factor(remove_padding=False, entropy=False) == 4


def test_the_highest_moment_counts(shape: ModelShape, settings: TrainerSettings) -> None:
    def names(**changes: object) -> set[str]:
        changed = replace(settings, actor=replace(settings.actor, **changes))  # type: ignore[arg-type]
        return {part.name for part in parts.training(shape, model_of(shape, changed.actor, 8), changed, "actor")}

    assert "logits" in names(flash_attention=False, train_entropy=True)
    assert "layer in backward" in names(fused_kernels=True, train=Batch(sequences=8))
    assert "deferred gradients" in names(no_sync=True)
    assert "last reduction" in names(fused_kernels=True)
    one = replace(settings, gpus_per_node=1, train_batch=1, mini_batch=1, n=1, prompt=8, response=8)
    items = parts.training(shape, model_of(shape, one.actor, 1), one, "actor")
    assert "Adam's step" in {part.name for part in items}


def test_a_critic_has_no_logits(shape: ModelShape, settings: TrainerSettings, engine: EngineSettings) -> None:
    critic = model_of(shape, engine, 8, critic=True)
    items = parts.training(shape, critic, settings, "critic")
    assert "logits" not in {part.name for part in items}
    values = parts.inference(shape, critic, settings, engine.infer, logits=False, entropy=False)
    assert total(values) < total(items)


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
    # vllm/v1/kv_cache_interface.py:174 in 0.24: a float32 scale for the keys and one for the values of each head
    assert parts.kv_bytes(shape, replace(rollout, kv_bytes=1, kv_scale_bytes=4)) == 2 * 28 * 4 * (128 + 4)


def test_parts_fill_the_budget(shape: ModelShape, settings: TrainerSettings) -> None:
    engine = parts.engine(shape, settings, 80 * GIB)
    assert engine.weights + engine.working + engine.kv == engine.budget == 40 * GIB
    assert engine.kv_tokens == engine.kv // (16 * engine.kv_bytes_per_token) * 16
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

"""The estimate against what GPUs measured: benchmarks/results/fit_on_gpu.json (one H100) and fit_verl_run.json (a run
of verl's).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.memory import parts
from flashrl_cli.memory.estimate import phases, run_of
from flashrl_cli.memory.model import shape_of
from flashrl_cli.memory.parts import FRAGMENTS, model_of, total
from flashrl_cli.text import GIB
from flashrl_cli.verl.config import Batch, EngineSettings, RolloutSettings, TrainerSettings
from flashrl_cli.weights.shape import ModelShape

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
POINTS = {
    point["point"]: point["measured"] for point in json.loads((RESULTS / "fit_on_gpu.json").read_text())["points"]
}
RUN = json.loads((RESULTS / "fit_verl_run.json").read_text())
OUTSIDE = {"trainer context", "sleeping engine"}
"""Items that PyTorch's count of the trainer's memory does not see."""


def qwen(size: str) -> ModelShape:
    found = shape_of(f"Qwen/Qwen2.5-{size.upper()}", Path("/nowhere"))
    assert found is not None
    return found


def of_kind(kind: str) -> list[str]:
    return [point for point in POINTS if point.startswith(f"{kind}:")]


@pytest.mark.parametrize("point", of_kind("engine"))
def test_engines(point: str, settings: TrainerSettings) -> None:
    _, size, precision = point.split(":")
    rollout = RolloutSettings(
        precision=precision,
        tensor_parallel=1,
        gpu_memory_utilization=0.95,
        max_num_seqs=256,
        max_num_batched_tokens=16384,
        max_model_len=2048,
    )
    measured = POINTS[point]
    found = parts.engine(qwen(size), replace(settings, rollout=rollout), measured["total"])
    assert found.weights == pytest.approx(measured["weights"], rel=0.04)
    assert found.kv_tokens == pytest.approx(measured["kv_tokens"], rel=0.03)


def peak_without_loop(measured: dict[str, Any], count: int, vocabulary: int, kind: str) -> float:
    """Peak of the updates; those of fit_on_gpu.json were measured with verl's loop over tokens, if they do not say
    otherwise, whose backward pass kept the log-softmax of each token in float32.
    """
    looped = kind != "fused" and measured.get("log_probs") != "chunks"
    kept = 4 * count * vocabulary if looped else 0
    peaks: dict[str, int] = measured["peaks"]
    return max(size - (kept if "micro" in moment else 0) for moment, size in peaks.items())


@pytest.mark.parametrize("point", of_kind("train"))
def test_updates(point: str, settings: TrainerSettings) -> None:
    _, size, strategy, count, kind = point.split(":")
    actor = EngineSettings(
        strategy=strategy,
        train=Batch(tokens=int(count)),
        infer=Batch(tokens=int(count)),
        checkpointing=kind != "plain",
        fused_kernels=kind == "fused",
        flash_attention=False,
    )
    one = replace(settings, gpus_per_node=1, prompt=int(count) // 2, response=int(count) // 2, actor=actor)
    items = parts.training(qwen(size), model_of(qwen(size), actor, 1), one, "actor")
    assert total(items) == pytest.approx(peak_without_loop(POINTS[point], int(count), qwen(size).vocab, kind), rel=0.02)


def verl_run(step: dict[str, Any]) -> TrainerSettings:
    """The run with the lengths that a step had.

    It was made with verl's own entropy, as is a run with flash-attn today.
    """
    actor = EngineSettings(train=Batch(tokens=16384), infer=Batch(tokens=16384), remove_padding=False)
    rollout = RolloutSettings(
        precision="int8",
        tensor_parallel=1,
        gpu_memory_utilization=0.4,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
        max_model_len=1536,
    )
    return TrainerSettings(
        nodes=1,
        gpus_per_node=2,
        prompt=step["longest_at_most"] - 512,
        response=512,
        train_batch=32,
        mini_batch=32,
        n=4,
        temperature=1.0,
        actor=actor,
        critic=None,
        reference=None,
        rollout=rollout,
        bucket=2 << 30,
        mean_share=step["mean_length"] / step["longest_at_most"],
    )


@pytest.mark.parametrize("step", RUN["trainer"]["steps"], ids=["step 1", "step 2"])
def test_trainer_of_a_padded_run_given_its_lengths(step: dict[str, Any]) -> None:
    settings = verl_run(step)
    found = phases(run_of(settings, qwen("1.5b"), None, 80 * GIB))
    # Adam's states come with the first step of the optimizer, after the peak of step 1
    absent = OUTSIDE | ({"actor Adam"} if step["step"] == 1 else set())
    held = [sum(part.bytes for part in phase.items if part.name not in absent) for phase in found[1:]]
    assert max(held) / GIB == pytest.approx(step["max_memory_allocated_gib"], rel=0.1)


def test_engine_of_the_same_run() -> None:
    measured = RUN["engine"]["measured"]
    found = parts.engine(qwen("1.5b"), verl_run(RUN["trainer"]["steps"][0]), 81_559 << 20)
    assert found.weights / GIB == pytest.approx(measured["weights_gib"], rel=0.05)
    assert found.kv_tokens == pytest.approx(measured["kv_tokens"], rel=0.02)


def test_the_allocator_s_reserve_is_within_the_margin() -> None:
    """What PyTorch held beyond the states, against what it had allocated there."""
    for step in RUN["trainer"]["steps"]:
        adam = 0 if step["step"] == 1 else 8 * 1.5437e9 / 2 / GIB
        passing = step["max_memory_allocated_gib"] - adam - 4 * 1.5437e9 / 2 / GIB
        extra = step["max_memory_reserved_gib"] - step["max_memory_allocated_gib"]
        assert extra / passing == pytest.approx(FRAGMENTS, abs=0.04)

"""What slows a step by its plan: each cause is named where it costs time, and its option makes it go away.

The real composition, rules and estimate of memory are used, and the options that are advised pass through them.
"""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.config.resolve import Options
from flashrl_cli.train import launch
from flashrl_cli.train.preflight import Validation, memory_of, validation_of
from flashrl_cli.train.speed import slow
from flashrl_cli.verl import compose, speed
from tests import sample_rows

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")

A, M, R = (f"actor_rollout_ref.{part}" for part in ("actor", "model", "rollout"))
PADDED = "model.packing=false"
SDPA = f"verl.+{M}.override_config.attn_implementation=sdpa"
ROWS = ("algorithm.micro_batch_size_per_gpu=16", "rollout.log_prob_micro_batch_size_per_gpu=16")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHRL_DATA", "FLASHRL_RUNS", "FLASHRL_CHECKPOINTS"):
        monkeypatch.setenv(name, str(tmp_path / name))


def of(*sets: str, preset: str = "gsm8k-grpo-0.5b", validation: Validation | None = None) -> dict[str, speed.Slow]:
    """What slows a preset under options, by its cause, after all that is checked before a start."""
    resolved = launch.read(preset, Options(sets=sets)).checked()
    plan = launch.next_plan(resolved, None, resume="never", look_only=True)
    judged = launch.Launch(resolved=plan.resolved, plan=plan, tree=launch.judge(plan.resolved, plan))
    memory = memory_of(plan.resolved, judged.tree)
    validated = validation or validation_of(plan.resolved, judged.tree)
    return {one.cause: one for one in slow(judged, memory, validated)}


CASES = {
    "padding": ((PADDED, *ROWS), "padding: 16 sequences of a pass are padded to the longest one, up to 2,048 tokens"),
    "attention": ((SDPA,), "attention: sdpa computes all pairs of tokens of a packed pass"),
    "passes": (
        (
            *("data.max_prompt_length=64", "data.max_response_length=128", "algorithm.mini_batch_size=256"),
            "algorithm.micro_batch_size_per_gpu=8",
        ),
        "small passes: the policy update takes 160 of about 768 tokens for a mini-batch, and larger ones fit",
    ),
    "recomputation": (
        ("model.recompute=true", "algorithm.max_tokens_per_gpu=4096"),
        "recomputation: updates compute each forward pass twice, a third more arithmetic; by the estimate of memory",
    ),
    "offload": (
        (
            f"verl.{A}.fsdp_config.param_offload=true",
            f"verl.{A}.fsdp_config.optimizer_offload=true",
            *("data.train_batch_size=32", "algorithm.mini_batch_size=32", "data.max_response_length=256"),
        ),
        "offload: parameters or optimizer state are copied to the CPU and back",
    ),
    "graphs": (("rollout.enforce_eager=true",), "generation: without CUDA graphs"),
    "waves": (
        ("rollout.max_num_seqs=128",),
        "generation: an engine samples its 1,280 responses of a step in 10 waves of 128",
    ),
    "cache": (
        (
            *("rollout.gpu_memory_utilization=0.1", "rollout.max_num_seqs=256", "data.max_response_length=7168"),
            *("algorithm.micro_batch_size_per_gpu=1", "rollout.log_prob_micro_batch_size_per_gpu=1"),
        ),
        "generation: the KV cache of an engine holds about ",
    ),
    "agents": (
        (f"verl.{R}.agent.num_workers=1", "rollout.n=16", "rollout.max_num_seqs=4096"),
        "generation: one agent-loop worker feeds the 4,096 responses of a step to the engines",
    ),
}


@pytest.mark.parametrize("cause", CASES)
def test_a_cause_is_named_and_its_option_avoids_it(cause: str) -> None:
    sets, text = CASES[cause]
    found = of(*sets)
    assert found[cause].text.startswith(text)
    words = shlex.split(found[cause].fix)
    assert words[::2] == ["--set"] * len(words[::2])
    assert cause not in of(*sets, *words[1::2])


def test_nothing_slows_a_run_that_is_set_well() -> None:
    assert of() == {}


def test_what_memory_does_not_allow_is_not_advised() -> None:
    small = ("resources.gpu_memory_gib=24",)
    kept = ("model.recompute=true", "algorithm.max_tokens_per_gpu=8192", "rollout.log_prob_max_tokens_per_gpu=8192")
    assert "recomputation" in of(*kept)
    assert of(*kept, *small) == {}


def test_short_or_single_sequences_are_not_worth_a_word() -> None:
    assert "padding" not in of(PADDED, "data.max_prompt_length=64", "data.max_response_length=64")
    alone = ("algorithm.micro_batch_size_per_gpu=1", "rollout.log_prob_micro_batch_size_per_gpu=1")
    assert "padding" not in of(PADDED, *alone)


def test_a_critic_is_packed_with_its_policy() -> None:
    fix = of(PADDED, preset="gsm8k-0.5b")["padding"].fix
    assert fix == "--set model.packing=true", "one key sets both"


def test_typical_prompts_are_said_where_they_were_counted(tmp_path: Path) -> None:
    from flashrl_cli import paths
    from flashrl_cli.data.writing import write_dataset

    where = paths.DatasetPaths.named("gsm8k")
    rows: list[Any] = [sample_rows.row(number) for number in range(4)]
    write_dataset(where, {"train": rows}, {}, {"train": {"prompt_tokens": {"p50": 105, "p99": 220, "longest": 300}}})
    assert "(half of the prompts have at most 105)" in of(PADDED)["padding"].text


@pytest.mark.parametrize(
    ("prompts", "every", "responses", "says"),
    [
        (1319, 5, 1, None),
        (1319, 1, 1, "each generates 1,319 responses, and 1 step trains on 1,280: --set trainer.validate_every=11"),
        (30, 5, 32, None),
        (1319, 5, 4, "each generates 5,276 responses, and 5 steps train on 6,400: --set trainer.validate_every=42"),
        (None, 1, 1, None),
        (1319, None, 1, None),
    ],
)
def test_validations_that_generate_about_as_much_as_the_steps_between(
    prompts: int | None, every: int | None, responses: int, says: str | None
) -> None:
    asked = Validation(data="gsm8k", prompts=prompts, responses=responses, before=1, every=every)
    found = of(validation=asked).get("validation")
    assert (str(found).partition("frequent validation: ")[2] if found else None) == says


@pytest.mark.parametrize("preset", ["tiny", "gsm8k-tiny-cpu"])
def test_nothing_of_a_gpu_is_said_of_a_run_on_a_cpu(preset: str) -> None:
    assert of(preset=preset) == {}


def test_verls_own_values() -> None:
    """Recorded runs are judged by these where their plans set nothing."""
    tree = compose.tree([f"{R}.name=vllm"])
    assert {key: tree.get(key) for key in speed.DEFAULTS} == speed.DEFAULTS

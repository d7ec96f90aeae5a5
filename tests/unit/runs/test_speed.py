"""Where the time of a run's steps goes, and what is said to slow them: by its metrics and its plan."""

from __future__ import annotations

from typing import Any

import pytest

from flashrl_cli import files
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs.speed import LAST, Speed, diagnose, recent
from flashrl_cli.runs.store import find
from flashrl_cli.runs.summary import summarize
from flashrl_cli.verl.metrics import StepMetrics, read_step
from flashrl_cli.verl.overrides import Places, overrides
from flashrl_cli.verl.speed import Recorded
from tests.specs import load_spec
from tests.unit.runs import on_disk

A, M, R = (f"actor_rollout_ref.{part}" for part in ("actor", "model", "rollout"))
PADDED = "model.packing=false"
SDPA = f"verl.+{M}.override_config.attn_implementation=sdpa"
STORED = "model.recompute=false"

MEASURED = (
    "data.train_batch_size=128",
    "data.max_prompt_length=320",
    "data.max_response_length=256",
    "rollout.n=8",
    "algorithm.mini_batch_size=64",
    "algorithm.micro_batch_size_per_gpu=64",
    "rollout.log_prob_micro_batch_size_per_gpu=128",
    "algorithm.kl_loss=false",
    "trainer.save_every=20",
    "trainer.validate_every=-1",
    PADDED,
    SDPA,
    STORED,
)
"""GRPO of a model of 135 M parameters on GSM8K, as it was run on one H200."""
STEP: on_disk.Logged = {
    "timing_s/gen": 12.2,
    "timing_s/old_log_prob": 17.0,
    "timing_s/adv": 0.1,
    "timing_s/update_actor": 46.0,
    "timing_s/update_weights": 0.5,
    "timing_s/step": 76.0,
    "perf/mfu/actor": 0.005,
    "perf/throughput": 2826.0,
    "perf/total_num_tokens": 214_784.0,
    "prompt_length/mean": 109.75,
    "prompt_length/max": 309.0,
    "response_length/mean": 100.0,
    "response_length/max": 256.0,
    "response_length/clip_ratio": 0.02,
    "critic/score/mean": 0.1,
}
"""What verl logged of one of its steps."""


def history(*changed: dict[str, float], count: int = 5, **more: float) -> list[StepMetrics]:
    """Steps like the measured one, each with values of its own, after a first one that is much slower."""
    first = {**STEP, "timing_s/step": 200.0, "timing_s/gen": 120.0}
    logged = [{**STEP, **more, **one} for one in (changed or [{}] * count)]
    return [read_step(number, data) for number, data in enumerate([first, *logged], 1)]


def plan(*sets: str, preset: str = "gsm8k-grpo-0.5b") -> dict[str, Any]:
    """What a plan records of a preset under options."""
    resolved = load_spec(preset, sets=sets)
    root = on_disk.place().root
    given = overrides(resolved, Places(name="r", data=root, checkpoints=root))
    return {
        "spec": resolved.spec.model_dump(mode="json"),
        "origins": {key: str(origin) for key, origin in resolved.origins.items()},
        "overrides": [str(override) for override in given],
    }


def of(*sets: str, **changed: Any) -> dict[str, tuple[str, str]]:
    """What is said of the measured run with more options and other values, by its cause: text and options."""
    found = diagnose(history(**changed), (), plan(*MEASURED, *sets))
    return {one.cause: (one.text, one.fix) for one in found.slow}


def test_the_measured_step() -> None:
    found = diagnose(history(), (), plan(*MEASURED))
    assert (found.steps, found.step_s, found.tokens_per_s, found.mfu) == (5, 76, 2826, 0.005)
    assert found.padding == pytest.approx(1 - 209.75 / 565)
    assert [one.cause for one in found.slow] == ["mfu", "padding", "passes"]
    update, padding, passes = found.slow
    assert update.text.startswith("policy update: 61% of a step at 0.5% of the GPU's peak arithmetic (MFU)")
    assert update.fix == ""
    assert "sequences of 210 tokens are padded to up to 565: up to 63% of what the trainer computes" in padding.text
    assert padding.fix.startswith("--set model.packing=true ")
    assert "attention" in padding.fix or "attn_implementation" in padding.fix, "packed input needs another one"
    assert "a mini-batch is updated in 8 passes of 64 responses, about 13,424 tokens" in passes.text
    assert passes.fix == (
        "--set algorithm.micro_batch_size_per_gpu=null --set rollout.log_prob_micro_batch_size_per_gpu=null "
        "--set algorithm.max_tokens_per_gpu=auto"
    )
    assert found.facts == (
        "policy update at 0.5% of the GPU's peak arithmetic (MFU), 2,826 tokens a second and device, "
        "responses of 100 tokens, the longest 256, 2% cut at the limit, up to 63% padding"
    )


def test_a_run_that_is_set_well_is_told_nothing() -> None:
    well = {"perf/mfu/actor": 0.35, "timing_s/update_actor": 4.0, "timing_s/old_log_prob": 1.0, "timing_s/step": 18.0}
    packed = ("model.packing=true", f"verl.+{M}.override_config.attn_implementation=flash_attention_2")
    assert of(*packed, **well, **{"response_length/max": 250.0}) == {}


@pytest.mark.parametrize(
    ("sets", "cause", "fix"),
    [
        (("model.packing=true",), "attention", ("attn_implementation=varlen",)),
        (("model.recompute=true",), "recomputation", ("--set model.recompute=false",)),
        ((f"verl.{A}.fsdp_config.optimizer_offload=true",), "offload", ("optimizer_offload=false",)),
    ],
)
def test_what_costs_time_is_named_where_the_update_computes_little(
    sets: tuple[str, ...], cause: str, fix: tuple[str, ...]
) -> None:
    assert cause not in of()
    assert any(text in of(*sets)[cause][1] for text in fix)
    assert cause not in of(*sets, **{"perf/mfu/actor": 0.2}), "it computes enough"
    assert cause not in of(*sets, **{"perf/mfu/actor": 0.0}), "verl does not know the GPU or the model"


def test_padding_is_named_by_what_it_wastes_whatever_the_mfu() -> None:
    assert "padding" in of(**{"perf/mfu/actor": 0.0})
    assert "padding" not in of(**{"prompt_length/max": 110.0, "response_length/max": 101.0})
    assert "padding" not in of(**{"timing_s/gen": 500.0, "timing_s/step": 560.0}), "the trainer's share is small"
    alone = ("algorithm.micro_batch_size_per_gpu=1", "rollout.log_prob_micro_batch_size_per_gpu=1")
    assert "padding" not in of(*alone), "one sequence a pass has no padding"


LONG = {"timing_s/gen": 200.0, "timing_s/step": 264.0}
"""A step that waits for generation."""


@pytest.mark.parametrize(
    ("sets", "changed", "cause", "text", "fix"),
    [
        (("rollout.enforce_eager=true",), {}, "graphs", "CUDA graphs", "--set rollout.enforce_eager=false"),
        (("rollout.max_num_seqs=256",), {}, "waves", "4 waves of 256", "--set rollout.max_num_seqs=1024"),
        (
            (f"verl.{R}.agent.num_workers=1", "rollout.n=32"),
            {},
            "agents",
            "one agent-loop worker feeds the 4,096 responses",
            f"--set verl.{R}.agent.num_workers=8",
        ),
        (
            (),
            {"response_length/mean": 60.0},
            "waiting",
            "256 tokens where the mean is 60, the limit that 2% of the responses reach",
            "",
        ),
    ],
)
def test_what_generation_waits_for(
    sets: tuple[str, ...], changed: dict[str, float], cause: str, text: str, fix: str
) -> None:
    assert cause not in of(**LONG)
    found = of(*sets, **LONG, **changed)[cause]
    assert text in found[0]
    assert found[1] == fix
    assert cause not in of(*sets, **changed), "generation is 16 % of the step"


@pytest.mark.parametrize(
    ("phase", "seconds", "key", "text"),
    [
        (
            "testing",
            {"timing_s/testing": 152.0},
            "validate_every",
            "50% of the time goes into validating every 2 steps",
        ),
        (
            "save_checkpoint",
            {"timing_s/save_checkpoint": 152.0, "timing_s/step": 228.0},
            "save_every",
            "50% of the time goes into saving every 2 steps",
        ),
    ],
)
def test_work_between_the_steps_that_takes_much_of_the_time(
    phase: str, seconds: dict[str, float], key: str, text: str
) -> None:
    often = plan(*MEASURED, f"trainer.{key}=2")
    (found,) = (one for one in diagnose(history({}, seconds, {}, seconds), (), often).slow if "frequent" in one.text)
    assert text in found.text
    assert found.fix == f"--set trainer.{key}=20"
    seldom = {**seconds, f"timing_s/{phase}": 20.0, "timing_s/step": 76.0 + 20.0 * (phase == "save_checkpoint")}
    causes = {one.cause for one in diagnose(history({}, seldom, {}, seldom), (), often).slow}
    assert not causes & {"validation", "checkpoints"}


def test_on_a_cpu_nothing_of_a_gpu_is_said() -> None:
    step = {
        **STEP,
        "timing_s/gen": 11.5,
        "timing_s/step": 29.0,
        "timing_s/old_log_prob": 1.3,
        "timing_s/update_actor": 2.4,
        "perf/mfu/actor": 0.04,
        "prompt_length/mean": 37.7,
        "prompt_length/max": 38.0,
        "response_length/mean": 14.2,
        "response_length/max": 16.0,
    }
    steps = [read_step(number, step) for number in (1, 2, 3)]
    found = diagnose(steps, (), plan(preset="tiny"))
    assert (found.mfu, found.slow) == (None, ())
    assert found.facts.startswith("2,826 tokens a second and device, responses of 14 tokens, the longest 16")


def test_without_a_plan_or_without_steps_nothing_is_said_to_slow_it() -> None:
    found = diagnose(history(), (), {})
    assert (found.slow, found.mfu, found.step_s) == ((), None, 76)
    assert diagnose([], (), plan()) == Speed()
    validated = [read_step(0, on_disk.validation(0.5))]
    assert diagnose(validated, (), plan()).slow == ()


def test_the_last_steps_count_without_those_that_warm_up() -> None:
    steps = history(count=2 * LAST)
    assert [metrics.step for metrics in recent(steps)] == list(range(LAST + 2, 2 * LAST + 2))
    assert [metrics.step for metrics in recent(steps[:5], starts=[2])] == [2, 4, 5]
    assert [metrics.step for metrics in recent(steps[:1])] == [1]


def test_keys_of_a_recorded_run() -> None:
    keys = Recorded(plan(*MEASURED, f"verl.{A}.optim.betas=[0.9, 0.99]"))
    assert keys.get(f"{M}.use_remove_padding") is False
    assert keys.get(f"{M}.override_config.attn_implementation") == "sdpa"
    assert keys.get(f"{A}.ppo_micro_batch_size_per_gpu") == 64
    assert keys.get("trainer.save_freq") == 20
    assert keys.get(f"{R}.max_num_seqs") == 1024
    assert keys.get(f"{R}.enforce_eager") is False, "the preset's default"
    assert keys.get(f"{R}.agent.num_workers") == 8, "verl's default"
    assert keys.get(f"{A}.optim.betas") == [0.9, 0.99]
    assert keys.get("no.such.key") is None
    assert Recorded({}).get(f"{M}.use_remove_padding") is True


def measured_run(name: str = "demo") -> RunPaths:
    """The measured run on disk, without its plan."""
    run = on_disk.make(name, on_disk.attempt(1))
    on_disk.log(run, 1, {number: dict(STEP) for number in range(1, 5)})
    return run


def with_plan(run: RunPaths) -> RunPaths:
    """The run with the plan that it had."""
    document = {"schema_version": 1, "env": {}, "files": {}, **plan(*MEASURED)}
    files.write_json(run.attempt(1).plan, document)
    return run


def test_a_run_on_disk_is_judged_by_its_newest_plan() -> None:
    run = measured_run()
    assert summarize(find("demo")).speed.slow == ()
    document = summarize(find(with_plan(run).name)).document()["speed"]
    assert document["steps"] == 3
    assert [one["cause"] for one in document["slow"]] == ["mfu", "padding", "passes"]
    on_disk.plan(run, 2)
    found = summarize(find("demo")).speed
    assert (found.mfu, found.slow) == (None, ()), "its newest plan is for a CPU"


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (("algorithm.max_tokens_per_gpu=8192",), "14 passes of at most 8,192 tokens"),
        (("algorithm.max_tokens_per_gpu=65536",), None),
        ((), None),
    ],
)
def test_only_passes_that_somebody_counted_are_advised_on(sets: tuple[str, ...], text: str | None) -> None:
    by_tokens = [one for one in MEASURED if "micro_batch_size" not in one]
    found = {one.cause: one for one in diagnose(history(), (), plan(*by_tokens, *sets)).slow}
    assert ("passes" in found) is (text is not None)
    if text:
        assert text in found["passes"].text
        assert found["passes"].fix == "--set algorithm.max_tokens_per_gpu=auto"


def test_responses_are_cut_only_at_the_limit() -> None:
    assert diagnose(history(), (), plan(*MEASURED)).cut == 0.02
    shorter = history({"response_length/max": 250.0})
    assert diagnose(shorter, (), plan(*MEASURED)).cut == 0, "it is only the longest of its batch"
    assert diagnose(history(), (), {}).cut is None

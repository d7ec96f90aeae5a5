"""benchmarks/step.py: phases, floors and ratios of a run's steps, and what floors.py takes of its sequences."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import floors, step
from benchmarks.floors import Sample

STEPS: list[dict[str, Any]] = [
    {"step": 1, "step_s": 90.0, "seconds": {"generate": 60.0, "log-probs": 9.0, "actor": 18.0, "validate": 70.0}},
    {"step": 2, "step_s": 22.0, "seconds": {"generate": 12.0, "log-probs": 2.0, "actor": 6.0, "validate": 70.0}},
    {"step": 3, "step_s": 20.0, "seconds": {"generate": 10.0, "log-probs": 3.0, "actor": 6.0}},
    {"step": 4, "step_s": 30.0, "seconds": {"generate": 11.0, "log-probs": 3.0, "actor": 14.0}},
]
MEASURED: dict[str, Any] = {
    "engine": {"seconds": 8.0},
    "trainer": {
        "log-probs": {"seconds": 1.0},
        "actor": {"seconds": 2.0},
        "operations": 1e14,
        "peak": 1e15,
        "job": {"devices": 1},
    },
}


def test_phases_are_medians_over_the_steps_after_the_first() -> None:
    assert step.phases(STEPS) == {"generate": 11.0, "log-probs": 3.0, "actor": 6.0, step.REST: 2.0}
    assert step.phases(STEPS[:1]) == {"generate": 60.0, "log-probs": 9.0, "actor": 18.0, step.REST: 3.0}


def test_the_floors_take_the_step_of_median_length() -> None:
    assert step.median_step(STEPS) == 2
    assert step.median_step(STEPS[:3]) == 3, "the quicker one of two"
    assert step.median_step(STEPS[:1]) == 1


def test_a_step_is_compared_with_the_sum_of_its_floors() -> None:
    found = step.compared(STEPS, MEASURED)
    assert found["floors"] == {"generate": 8.0, "log-probs": 1.0, "actor": 2.0, "step": 11.0}
    assert found["ratios"] == {"generate": 1.375, "log-probs": 3.0, "actor": 3.0, "step": 2.0}
    assert found["mfu"]["actor"] == {"run": 0.05, "floor": 0.15}
    assert found["mfu"]["log-probs"] == {"run": 0.0333, "floor": 0.1}


def test_a_reference_policy_has_the_floor_of_log_probs_once_more() -> None:
    steps = [{**one, "seconds": {**one["seconds"], "reference": 2.0}} for one in STEPS]
    found = step.compared(steps, MEASURED)
    assert found["floors"]["step"] == 12.0
    assert found["ratios"]["reference"] == 2.0


@pytest.mark.parametrize("left_out", ["engine", "trainer"])
def test_without_all_floors_the_step_has_no_ratio(left_out: str) -> None:
    found = step.compared(STEPS, {name: result for name, result in MEASURED.items() if name != left_out})
    assert "step" not in found["ratios"]
    assert "step" not in found["floors"]
    assert found["ratios"].keys() == ({"log-probs", "actor"} if left_out == "engine" else {"generate"})


def test_a_critic_has_no_floor_so_that_its_step_has_no_ratio() -> None:
    steps = [{**one, "seconds": {**one["seconds"], "values": 1.0, "critic": 3.0}} for one in STEPS]
    assert "step" not in step.compared(steps, MEASURED)["ratios"]


def test_the_table_has_a_line_for_each_phase_and_for_the_step() -> None:
    case = {"label": "m int8", "sequences": 1024, "tokens": 200_000, "compared": step.compared(STEPS, MEASURED)}
    lines = step.table([case]).splitlines()
    assert lines[0] == "m int8: 1,024 sequences, 200,000 tokens a step"
    assert lines[3].split() == ["log-probs", "3.00", "1.00", "3.00", "3.3%", "10.0%"]
    assert lines[-1].split() == ["step", "22.00", "11.00", "2.00", "–", "–"]
    assert "no weights" in step.table([{"label": "m fp8", "failed": "no weights"}])


def test_samples_of_py_spy_are_grouped_by_the_trainers_phases() -> None:
    text = "main (a.py:1);Worker.update_actor (w.py:9);matmul (t.py:3) 7\nmain (a.py:1);matmul (t.py:3) 2\n"
    text += "main (a.py:1);update_actor (w.py:9);copy (t.py:4) 1\nThread.run (threading.py:982) 90\n"
    assert step.heaviest(text) == {
        "update_actor": {"samples": 8, "self": {"matmul (t.py:3)": 7, "copy (t.py:4)": 1}},
        "others": {"samples": 2, "self": {"matmul (t.py:3)": 2}},
    }


def test_a_profile_is_summed_up_for_reading() -> None:
    spied = {"WorkerDict": {"update_actor": {"samples": 800, "self": {"matmul (t.py:3)": 500}}}}
    traced = {"update.json.gz": {"seconds": 2.0, "kernels": 9000, "kernels_s": 0.5, "top_s": {"gemm": 0.3}}}
    assert step.profile_text({"spied": spied, "traced": traced}).splitlines() == [
        "WorkerDict, update_actor: 800 samples of 1000",
        "   50.0%  matmul (t.py:3)",
        "update.json.gz: 2.000 s, 9,000 kernels, busy 0.500 s",
        "     0.300 s  gemm",
    ]
    assert step.profile_text({}) == ""


def test_an_operators_own_time_leaves_out_those_that_it_calls() -> None:
    events = [
        {"name": "linear", "tid": 1, "ts": 0, "dur": 10},
        {"name": "mm", "tid": 1, "ts": 2, "dur": 6},
        {"name": "copy", "tid": 1, "ts": 3, "dur": 1},
        {"name": "mm", "tid": 1, "ts": 10, "dur": 4},
        {"name": "mm", "tid": 2, "ts": 1, "dur": 5},
    ]
    assert step.own_time(events) == {"linear": 4, "mm": 14, "copy": 1}


def samples(*sizes: int) -> list[Sample]:
    return [Sample([1] * 2, [2] * (size - 2)) for size in sizes]


def test_packed_micro_batches_are_within_the_budget() -> None:
    groups = [[len(one.tokens) for one in group] for group in floors.packed(samples(9, 5, 4, 3, 3), 10)]
    assert groups == [[9], [5, 4], [3, 3]]
    assert [len(group) for group in floors.packed(samples(20, 4), 10)] == [1, 1], "a longer one is alone"


def test_padded_micro_batches_count_their_padding() -> None:
    groups = [[len(one.tokens) for one in group] for group in floors.padded(samples(5, 4, 4, 3), 10)]
    assert groups == [[5, 4], [4, 3]]


def test_mini_batches_are_equal_shares() -> None:
    parts = floors.split(whole := samples(*range(5, 15)), 3)
    assert [len(part) for part in parts] == [4, 3, 3]
    assert [one for part in parts for one in part] == whole


def test_drawn_samples_share_prompts_within_a_group() -> None:
    found = floors.drawn([(3, 5), (3, 6), (4, 7), (4, 8)], 100, n=2)
    assert [(len(one.prompt), len(one.response)) for one in found] == [(3, 5), (3, 6), (4, 7), (4, 8)]
    assert found[0].prompt == found[1].prompt
    assert found[2].prompt == found[3].prompt != found[0].prompt


def test_samples_are_read_as_written(tmp_path: Path) -> None:
    wanted = floors.drawn([(3, 5), (2, 1)], 100)
    floors.write_samples(tmp_path / "s.jsonl", wanted)
    assert floors.read_samples(tmp_path / "s.jsonl") == wanted


PLAN: dict[str, Any] = {
    "overrides": ["actor_rollout_ref.rollout.calculate_log_probs=True", "actor_rollout_ref.model.path=MODEL"],
    "spec": {
        "data": {"train_batch_size": 32},
        "algorithm": {"mini_batch_size": 16, "lr": 1e-4},
        "rollout": {
            "precision": "int8", "kv_cache": "fp8", "lm_head_fp32": False, "n": 8, "temperature": 1.0, "top_p": 1.0,
            "top_k": -1, "tensor_parallel": 1, "gpu_memory_utilization": 0.4, "max_num_seqs": 256,
            "max_num_batched_tokens": 8192, "max_model_len": 80, "enforce_eager": False,
        },
        "resources": {"platform": "cuda", "nodes": 1, "gpus_per_node": 2},
        "verl": {"actor_rollout_ref.model.lora_rank": 32},
    },
}  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    text = json.dumps(PLAN).replace("MODEL", str(tmp_path))
    made: dict[str, Any] = json.loads(text)
    return made


def test_an_engine_is_set_up_as_the_runs(plan: dict[str, Any], tmp_path: Path) -> None:
    job = floors.engine_job(plan, tmp_path / "s.jsonl")
    assert (job.precision, job.kv_cache, job.head32, job.lora_rank) == ("int8", "fp8", False, 32)
    assert job.sampling == {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": 0}
    assert job.settings["max_num_seqs"] == 256
    assert job.on_gpu == {"gpu_memory_utilization": 0.4, "enforce_eager": False}
    plan["overrides"][0] = "x=1"
    plan["spec"]["verl"]["actor_rollout_ref.model.lora.merge"] = True
    job = floors.engine_job(plan, tmp_path / "s.jsonl")
    assert "logprobs" not in job.sampling
    assert job.lora_rank == 0, "the engine gets whole weights"


def test_a_trainer_updates_once_a_mini_batch_on_the_runs_devices(plan: dict[str, Any], tmp_path: Path) -> None:
    job = floors.trainer_job(plan, tmp_path / "s.jsonl")
    assert (job.mini_batches, job.devices, job.lr, job.lora_rank, job.master) == (2, 2, 1e-4, 32, True)
    plan["spec"]["verl"]["actor_rollout_ref.actor.fsdp_config.model_dtype"] = "bf16"
    assert not floors.trainer_job(plan, tmp_path / "s.jsonl").master


def test_engines_share_the_samples(plan: dict[str, Any]) -> None:
    assert len(floors.share(samples(*[5] * 8), plan["spec"])) == 4
    plan["spec"]["rollout"]["tensor_parallel"] = 2
    assert len(floors.share(samples(*[5] * 8), plan["spec"])) == 8


def test_a_bare_loop_over_as_many_tokens_is_measured_once(plan: dict[str, Any], tmp_path: Path) -> None:
    job = floors.trainer_job(plan, tmp_path / "s.jsonl")
    sizes = {"sequences": 8, "tokens": 40, "response_tokens": 24}
    done = {"actor": {"seconds": 2.0}, "job": {**dataclasses.asdict(job), "samples": "other.jsonl"}}
    earlier = [{"label": "m bf16", "trainer": done, **sizes}]
    assert step.alike(sizes, job, earlier) == {**done, "measured_with": "m bf16"}
    assert step.alike({**sizes, "tokens": 41}, job, earlier) is None
    assert step.alike(sizes, dataclasses.replace(job, mini_batches=1), earlier) is None
    assert step.alike(sizes, job, [{"label": "m bf16", "trainer": {"failed": "exit 1"}, **sizes}]) is None

"""Which cause a log shows.

A log without a heading is of a run of verl 0.9.1 with Ray 2.60 and vLLM that was made to fail; a heading tells where else a text is from.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.verl.causes import CAUSES, Cause, cause_in
from flashrl_cli.verl.logs import plain

LOGS = Path(__file__).parent / "logs"
HEALTHY = ("healthy", "resumed", "interrupted", "two_nodes")
UNKNOWN = ("reward_raises",)
SHOWN = {
    "checkpoint_damaged": "checkpoint-damaged",
    "checkpoint_misfit": "weights-misfit",
    "checkpoint_of_another_size": "checkpoint-size",
    "cluster_small": "cluster-small",
    "data_absent": "data",
    "data_column": "column",
    "data_damaged": "data",
    "data_filtered": "no-data",
    "disk_full": "disk-full",
    "disk_full_save": "disk-full",
    "engine_attention": "attention",
    "engine_cache_none": "kv-memory",
    "engine_cache_small": "kv-memory",
    "engine_died": "engine-died",
    "engine_memory": "kv-memory-cpu",
    "engine_length": "model-length",
    "engine_quantization": "quantization",
    "engine_unwritten": "engine-unwritten",
    "engine_worker_died": "engine-died",
    "files_open": "files-open",
    "gpu_busy": "gpu-busy",
    "gpu_driver": "gpu-driver",
    "gpu_failed": "gpu-failed",
    "gpu_kernel": "gpu-kernel",
    "gpu_memory": "gpu-memory",
    "gpu_memory_accelerator": "gpu-memory",
    "gpu_missing": "gpu-missing",
    "gpu_occupied": "gpu-occupied",
    "gpu_twice": "gpu-missing",
    "gpu_unknown": "gpu-unknown",
    "memory_numpy": "memory",
    "memory_torch": "memory",
    "model_absent": "model",
    "model_unknown": "model",
    "model_unreadable": "model",
    "nccl_error": "nccl-error",
    "nccl_timeout": "nccl-timeout",
    "node_lost": "node-lost",
    "package_missing": "package",
    "package_missing_for_ray": "package",
    "package_without_metadata": "package",
    "package_missing_on_worker": "package",
    "permission": "permission",
    "permission_read_only": "permission",
    "port_taken": "port-taken",
    "processes": "processes",
    "ray_broken": "ray-broken",
    "ray_gcs_killed": "ray-broken",
    "ray_late": "ray-late",
    "ray_memory": "ray-memory",
    "ray_raylet_killed": "ray-broken",
    "reward_absent": "reward-function",
    "reward_unknown": "no-scorer",
    "sampling_failed": "sampling-batch",
    "setting_refused": "setting",
    "setting_unknown": "setting",
    "threads": "processes",
    "tokenizer_absent": "tokenizer",
    "tokenizer_damaged": "tokenizer",
    "weights_damaged": "weights-damaged",
    "weights_misfit": "weights-misfit",
    "worker_died": "worker-died",
    "worker_killed": "worker-died",
}


def lines_of(name: str) -> list[str]:
    return (LOGS / f"{name}.log").read_text(encoding="utf-8").splitlines()


def causes_in(name: str) -> list[Cause]:
    return [cause for line in lines_of(name) if (cause := cause_in(plain(line)))]


@pytest.mark.parametrize(("name", "cause"), SHOWN.items(), ids=SHOWN)
def test_the_most_specific_cause_of_a_log(name: str, cause: str) -> None:
    assert min(causes_in(name), key=CAUSES.index).id == cause


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_a_user_raises_is_no_known_cause(name: str) -> None:
    assert causes_in(name) == []


def test_every_cause_is_seen_in_a_log() -> None:
    seen = {cause.id for name in SHOWN for cause in causes_in(name)}
    assert {cause.id for cause in CAUSES} == seen


def test_only_what_verl_outlives_ends_no_run() -> None:
    assert {cause.id for cause in CAUSES if not cause.fatal} == {
        "permission",
        "port-taken",
        "package",
        "column",
        "no-scorer",
        "sampling",
    }


def test_what_a_log_shows_after_the_cause_is_known_too() -> None:
    assert [cause.id for cause in causes_in("package_missing_for_ray")] == [
        "package",
        "ray-broken",
        "package",
        "ray-broken",
    ]


def test_colours_hide_no_cause() -> None:
    found = cause_in(plain("\x1b[36m(WorkerDict pid=7)\x1b[0m OSError: [Errno 28] No space left on device"))
    assert found
    assert found.id == "disk-full"


def test_the_more_specific_cause_wins_within_a_line() -> None:
    found = cause_in("ray.exceptions.ActorDiedError: OSError: [Errno 28] No space left on device")
    assert found
    assert found.id == "disk-full"


def test_every_log_is_tested() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == {*SHOWN, *UNKNOWN, *HEALTHY}


@pytest.mark.parametrize("name", [*SHOWN, *UNKNOWN, *HEALTHY])
def test_logs_are_short_and_of_no_machine(name: str) -> None:
    text = "\n".join(lines_of(name))
    assert len(lines_of(name)) <= (200 if name in HEALTHY else 60)
    assert "\x1b" not in text
    assert "/work/" not in text
    assert f"/{'root'}/" not in text


@pytest.mark.parametrize("name", HEALTHY)
def test_a_run_that_goes_well_shows_no_cause(name: str) -> None:
    assert causes_in(name) == []


def test_every_cause_tells_what_happened_and_what_to_do() -> None:
    assert len({cause.what for cause in CAUSES}) == len({cause.id for cause in CAUSES}) == len(CAUSES)
    assert all(cause.what and cause.hint for cause in CAUSES)
    assert not [cause.what for cause in CAUSES if "\n" in cause.what + cause.hint or cause.what.endswith(".")]

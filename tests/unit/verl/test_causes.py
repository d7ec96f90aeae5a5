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
    "checkpoint_damaged": "the checkpoint is damaged",
    "checkpoint_misfit": "the weights do not fit the model's configuration",
    "checkpoint_of_another_size": "the checkpoint was written by another number of GPUs",
    "cluster_small": "the cluster has fewer GPUs than the run asks for",
    "data_absent": "the training data cannot be read",
    "data_column": "the data lacks a column that verl reads",
    "data_damaged": "the training data cannot be read",
    "data_filtered": "no training data is left",
    "disk_full": "a disk is full",
    "disk_full_save": "a disk is full",
    "engine_attention": "the rollout engine does not know the attention backend",
    "engine_cache_none": "the rollout engine has no memory left for its KV cache",
    "engine_cache_small": "the rollout engine has no memory left for its KV cache",
    "engine_died": "a worker of the rollout engine died",
    "engine_memory": "the machine has less memory than the rollout engine's KV cache asks for",
    "engine_length": "prompt and response are longer than the model can take",
    "engine_quantization": "the rollout engine does not know the quantization",
    "engine_unwritten": "a weight update left parameters of the rollout engine without their new weights",
    "engine_worker_died": "a worker of the rollout engine died",
    "files_open": "too many open files",
    "gpu_busy": "a GPU is taken by another process",
    "gpu_driver": "the NVIDIA driver is too old for this torch",
    "gpu_failed": "a GPU failed",
    "gpu_kernel": "a GPU kernel went wrong",
    "gpu_memory": "a GPU ran out of memory",
    "gpu_memory_accelerator": "a GPU ran out of memory",
    "gpu_missing": "a process was given a GPU that is not there",
    "gpu_occupied": "a GPU has less free memory than the rollout engine asks for",
    "gpu_twice": "a process was given a GPU that is not there",
    "gpu_unknown": "torch or vLLM was not built for this kind of GPU",
    "memory_numpy": "the machine's memory cannot hold what was asked for",
    "memory_torch": "the machine's memory cannot hold what was asked for",
    "model_absent": "the model could not be loaded",
    "model_unknown": "the model could not be loaded",
    "model_unreadable": "the model could not be loaded",
    "nccl_error": "the GPUs could not talk to each other (NCCL)",
    "nccl_timeout": "the GPUs waited in vain for one of them",
    "node_lost": "a Ray worker or its node cannot be reached",
    "package_missing": "a Python package is missing",
    "package_missing_for_ray": "a Python package is missing",
    "package_without_metadata": "a Python package is missing",
    "package_missing_on_worker": "a Python package is missing",
    "permission": "a file or folder may not be read or written",
    "permission_read_only": "a file or folder may not be read or written",
    "port_taken": "a network port is taken",
    "processes": "this user may start no more processes or threads",
    "ray_broken": "Ray itself broke down",
    "ray_gcs_killed": "Ray itself broke down",
    "ray_late": "Ray did not start in time",
    "ray_memory": "Ray ended a process because the machine's memory ran out",
    "ray_raylet_killed": "Ray itself broke down",
    "reward_absent": "the reward function could not be loaded",
    "reward_unknown": "verl has no scorer for the data's data_source",
    "sampling_failed": "no response of a whole batch could be sampled and scored",
    "setting_refused": "verl refuses a setting",
    "setting_unknown": "verl refuses a setting",
    "threads": "this user may start no more processes or threads",
    "tokenizer_absent": "the tokenizer is missing, damaged, or has no chat template",
    "tokenizer_damaged": "the tokenizer is missing, damaged, or has no chat template",
    "weights_damaged": "the model's weights are damaged",
    "weights_misfit": "the weights do not fit the model's configuration",
    "worker_died": "a Ray worker died",
    "worker_killed": "a Ray worker died",
}


def lines_of(name: str) -> list[str]:
    return (LOGS / f"{name}.log").read_text(encoding="utf-8").splitlines()


def causes_in(name: str) -> list[Cause]:
    return [cause for line in lines_of(name) if (cause := cause_in(plain(line)))]


@pytest.mark.parametrize(("name", "what"), SHOWN.items(), ids=SHOWN)
def test_the_most_specific_cause_of_a_log(name: str, what: str) -> None:
    assert min(causes_in(name), key=CAUSES.index).what == what


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_a_user_raises_is_no_known_cause(name: str) -> None:
    assert causes_in(name) == []


def test_every_cause_is_seen_in_a_log() -> None:
    seen = {cause.what for name in SHOWN for cause in causes_in(name)}
    assert {cause.what for cause in CAUSES} == seen


def test_only_what_verl_outlives_ends_no_run() -> None:
    assert {cause.what for cause in CAUSES if not cause.fatal} == {
        "a file or folder may not be read or written",
        "a network port is taken",
        "a Python package is missing",
        "the data lacks a column that verl reads",
        "verl has no scorer for the data's data_source",
        "responses could not be sampled or scored",
    }


def test_what_a_log_shows_after_the_cause_is_known_too() -> None:
    assert [cause.what for cause in causes_in("package_missing_for_ray")] == [
        "a Python package is missing",
        "Ray itself broke down",
        "a Python package is missing",
        "Ray itself broke down",
    ]


def test_colours_hide_no_cause() -> None:
    found = cause_in(plain("\x1b[36m(WorkerDict pid=7)\x1b[0m OSError: [Errno 28] No space left on device"))
    assert found
    assert found.what == "a disk is full"


def test_the_more_specific_cause_wins_within_a_line() -> None:
    found = cause_in("ray.exceptions.ActorDiedError: OSError: [Errno 28] No space left on device")
    assert found
    assert found.what == "a disk is full"


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
    assert len({cause.what for cause in CAUSES}) == len(CAUSES)
    assert all(cause.what and cause.hint for cause in CAUSES)
    assert not [cause.what for cause in CAUSES if "\n" in cause.what + cause.hint or cause.what.endswith(".")]

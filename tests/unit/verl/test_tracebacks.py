"""The exception at the root of a log."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.verl.logs import MAX_LENGTH, root_error

LOGS = Path(__file__).parent / "logs"
ROOTS = {
    "cluster_small": "ValueError: Total available GPUs 0 is less than total desired GPUs 8 (verl/single_controller/ray/base.py:240)",
    "data_absent": "FileNotFoundError: Unable to find '/data/none.parquet' (verl/utils/dataset/rl_dataset.py:174)",
    "data_column": "KeyError: 'prompt' (verl/utils/dataset/rl_dataset.py:313)",
    "disk_full": "OSError: [Errno 28] No space left on device (/srv/user/probe.py:59)",
    "files_open": "OSError: [Errno 24] Too many open files (/srv/user/probe.py:72)",
    "gpu_busy": "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable (torch/serialization.py:269)",
    "gpu_failed": "RuntimeError: CUDA error: uncorrectable ECC error encountered (verl/single_controller/ray/base.py:432)",
    "gpu_memory_accelerator": "torch.AcceleratorError: CUDA error: out of memory (/srv/user/probe.py:12)",
    "gpu_missing": "torch.AcceleratorError: CUDA error: invalid device ordinal (/srv/user/probe.py:8)",
    "package_missing": "ModuleNotFoundError: No module named 'no_such_module' (verl/utils/import_utils.py:88)",
    "package_missing_for_ray": "ModuleNotFoundError: No module named 'ray' (ray/_private/workers/default_worker.py:8)",
    "package_missing_on_worker": "ModuleNotFoundError: No module named 'annotated_types' (pydantic/fields.py:17)",
    "permission": "PermissionError: [Errno 13] Permission denied: '/data/checkpoints/tiny' (/srv/user/probe.py:4)",
    "permission_read_only": "OSError: [Errno 30] Read-only file system: '/data/checkpoints/tiny' (/srv/user/probe.py:4)",
    "processes": "BlockingIOError: [Errno 11] Resource temporarily unavailable (/srv/user/probe.py:10)",
    "ray_late": (
        "Exception: The current node timed out during startup. This could happen because some of the raylet failed to startup "
        "or the GCS has become overloaded. (verl/trainer/main_ppo.py:74)"
    ),
    "ray_raylet_killed": (
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task. class_name: TaskRunnerV1 "
        "(verl/trainer/main_ppo.py:196)"
    ),
    "reward_raises": "KeyError: 'points' (/srv/user/my_reward.py:8)",
    "setting_refused": "ValueError: train_batch_size (16) must be >= actor.ppo_mini_batch_size (64) (verl/workers/config/actor.py:226)",
    "worker_died": "TaskRunnerV1 (pid 1001): Worker unexpectedly exits with a connection error code 2",
    "worker_killed": "WorkerDict (pid 1002): Worker unexpectedly exits with a connection error code 2",
    "threads": "RuntimeError: can't start new thread (/srv/user/probe.py:8)",
}
PARTS = {
    "engine_unwritten": (
        "flashrl_cli.plugins.coverage.Incomplete: the weight update left 1 parameter",
        "coverage.py:116)",
    ),
    "checkpoint_damaged": (
        "RuntimeError: PytorchStreamReader failed reading zip archive: failed",
        "(torch/serialization.py:807)",
    ),
    "checkpoint_misfit": (
        "RuntimeError: Error(s) in loading state_dict for Linear: size",
        "(torch/nn/modules/module.py:2638)",
    ),
    "checkpoint_of_another_size": (
        "FileNotFoundError: [Errno 2] No such file or directory:",
        "(torch/serialization.py:776)",
    ),
    "data_damaged": (
        "pyarrow.lib.ArrowInvalid: Parquet magic bytes not found in footer.",
        "(verl/utils/dataset/rl_dataset.py:174)",
    ),
    "disk_full_save": (
        "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected",
        "(verl/utils/checkpoint/fsdp_checkpoint_manager.py:347)",
    ),
    "engine_attention": (
        "ValueError: Unknown attention backend: 'NO_SUCH'. Valid options are:",
        "(vllm/v1/attention/backends/registry.py:28)",
    ),
    "engine_cache_none": (
        "ValueError: No available memory for the cache blocks. Try increasing",
        "(vllm/v1/core/kv_cache_utils.py:738)",
    ),
    "engine_cache_small": (
        "ValueError: To serve at least one request with the model's max seq",
        "(vllm/v1/core/kv_cache_utils.py:758)",
    ),
    "engine_length": (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for",
        "(pydantic/_internal/_dataclasses.py:121)",
    ),
    "engine_quantization": (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for",
        "(pydantic/_internal/_dataclasses.py:121)",
    ),
    "gpu_memory": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 13.91",
        "(verl/utils/torch_functional.py:148)",
    ),
    "gpu_occupied": (
        "ValueError: Free memory on device cuda:0 (59.32/79.15 GiB) on startup",
        "(vllm/v1/worker/utils.py:454)",
    ),
    "gpu_twice": ("torch.distributed.DistBackendError: NCCL error in:", "(/srv/user/probe.py:9)"),
    "gpu_unknown": (
        "RuntimeError: CUDA error: no kernel image is available for execution",
        "(vllm/v1/engine/core.py:623)",
    ),
    "memory_numpy": ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.11", "(/srv/user/probe.py:68)"),
    "memory_torch": ("RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0.", "(/srv/user/probe.py:67)"),
    "model_absent": (
        "OSError: We couldn't connect to 'https://huggingface.co' to load the",
        "(verl/utils/tokenizer/tokenizer.py:176)",
    ),
    "model_unknown": (
        "ValueError: The checkpoint you are trying to load has model type",
        "(verl/workers/config/model.py:187)",
    ),
    "model_unreadable": (
        "ValueError: Unrecognized model in /data/tiny/model. Should have a",
        "(verl/workers/config/model.py:187)",
    ),
    "nccl_error": ("torch.distributed.DistBackendError: NCCL error in:", "(/srv/user/probe.py:9)"),
    "port_taken": (
        "torch.distributed.DistNetworkError: The server socket has failed to",
        "(torch/distributed/rendezvous.py:199)",
    ),
    "ray_broken": (
        "ray.exceptions.LocalRayletDiedError: The task's local raylet died.",
        "(verl/trainer/main_ppo.py:93)",
    ),
    "ray_memory": ("ray.exceptions.OutOfMemoryError: Task was killed due to the node", "(verl/trainer/main_ppo.py:93)"),
    "reward_absent": ("FileNotFoundError: Custom module file not found:", "(verl/utils/import_utils.py:179)"),
    "reward_unknown": (
        "NotImplementedError: Reward function is not implemented for",
        "(verl/utils/reward_score/__init__.py:107)",
    ),
    "setting_unknown": (
        "hydra.errors.ConfigCompositionException: Could not override",
        "(verl/trainer/main_ppo.py:196)",
    ),
    "node_lost": (
        "ray.exceptions.ActorUnavailableError: The actor 00000000000000000000000000000001 is unavailable",
        "(verl/trainer/main_ppo.py:93)",
    ),
    "package_without_metadata": (
        "importlib.metadata.PackageNotFoundError: No package metadata was found for The 'filelock' distribution",
        "(verl/utils/torch_functional.py:30)",
    ),
    "sampling_failed": (
        "RuntimeError: Sync replay buffer selected terminal groups",
        "(verl/trainer/ppo/v1/replay_buffer.py:510)",
    ),
    "tokenizer_absent": (
        "ValueError: Cannot use chat template functions because tokenizer.chat_template is not set",
        "(transformers/tokenization_utils_base.py:3269)",
    ),
    "tokenizer_damaged": (
        "json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes",
        "(verl/utils/tokenizer/tokenizer.py:176)",
    ),
    "weights_damaged": (
        "safetensors._safetensors_rust.SafetensorError: Error while",
        "(transformers/modeling_utils.py:4426)",
    ),
    "weights_misfit": (
        "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus",
        "(transformers/utils/loading_report.py:278)",
    ),
}
WITHOUT = (
    "two_nodes",
    "engine_memory",
    "data_filtered",
    "engine_died",
    "engine_worker_died",
    "gpu_driver",
    "gpu_kernel",
    "healthy",
    "interrupted",
    "nccl_timeout",
    "ray_gcs_killed",
    "resumed",
)


def root_of(name: str) -> str | None:
    return root_error((LOGS / f"{name}.log").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(("name", "root"), ROOTS.items(), ids=ROOTS)
def test_root_of_a_log(name: str, root: str) -> None:
    assert root_of(name) == root


@pytest.mark.parametrize(("name", "ends"), PARTS.items(), ids=PARTS)
def test_root_with_a_long_message(name: str, ends: tuple[str, str]) -> None:
    root = root_of(name)
    assert root
    assert root.startswith(ends[0])
    assert root.endswith(ends[1])


@pytest.mark.parametrize("name", WITHOUT)
def test_a_log_without_a_traceback_of_the_run_has_no_root(name: str) -> None:
    assert root_of(name) is None


def test_every_log_is_tested() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == {*ROOTS, *PARTS, *WITHOUT}


FRAME = '  File "/srv/user/reward.py", line 3, in score'
RAISED = ["Traceback (most recent call last):", FRAME, '    return row["points"]', "KeyError: 'points'"]


def test_processes_that_write_at_once_are_told_apart() -> None:
    one = [f"\x1b[36m(Reward pid=1)\x1b[0m {line}" for line in RAISED]
    two = [f"(Worker pid=2, ip=192.0.2.1) {line}" for line in ("Loading weights", "  0%", "ready", "step:1 - loss:1")]
    mixed = [line for pair in zip(one, two, strict=True) for line in pair]
    assert root_error(mixed) == "KeyError: 'points' (/srv/user/reward.py:3)"


def test_a_death_without_an_exception_is_told_by_who_died() -> None:
    death = "Worker PID: 7 Worker exit type: SYSTEM_ERROR Worker exit detail: it was killed. It is gone."
    assert (
        root_error(["(Idle pid=77) y", "(WorkerDict pid=7, ip=192.0.2.1) x", death])
        == "WorkerDict (pid 7): it was killed"
    )
    assert root_error([death]) == "process (pid 7): it was killed"
    assert root_error([death, *RAISED]) == "KeyError: 'points' (/srv/user/reward.py:3)"


def test_what_only_follows_from_another_failure_is_passed_over() -> None:
    died = ["Traceback (most recent call last):", FRAME, "ray.exceptions.ActorDiedError: The actor died unexpectedly"]
    assert root_error([*RAISED, *died]) == "KeyError: 'points' (/srv/user/reward.py:3)"
    assert root_error(died) == "ray.exceptions.ActorDiedError: The actor died unexpectedly (/srv/user/reward.py:3)"


def test_the_last_failure_is_the_one_that_ended_the_run() -> None:
    later = ["Traceback (most recent call last):", FRAME.replace("3", "9"), "AssertionError"]
    assert root_error([*RAISED, *later]) == "AssertionError (/srv/user/reward.py:9)"


def test_words_after_a_frame_are_no_exception() -> None:
    assert root_error(["Traceback (most recent call last):", FRAME, "and then: nothing"]) is None
    assert root_error(["ValueError: said in passing"]) is None
    assert root_error([]) is None


def test_a_long_message_is_cut() -> None:
    root = root_error([*RAISED[:3], "ValueError: " + "x" * 2000])
    assert root
    assert root.endswith("… (/srv/user/reward.py:3)")
    assert len(root) == MAX_LENGTH + len(" (/srv/user/reward.py:3)")

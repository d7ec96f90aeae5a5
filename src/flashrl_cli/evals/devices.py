"""Which GPUs an evaluation takes: those with the most free memory, so that it does not get in a training run's way."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli.doctor import gpus
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.evals.job import EngineSettings

QUERY = ("--query-gpu=index,memory.total,memory.free", "--format=csv,noheader,nounits")
_USUAL = 0.9
"""vLLM's own gpu_memory_utilization."""
_MARGIN = 0.03
"""Share of the memory that stays free beside the other process and ours."""
_LEAST = 0.1
"""A GPU with less free memory than this share of it is taken."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by its index, with memory in MiB."""

    index: int
    total: int
    free: int

    @property
    def share(self) -> float:
        """Share of its memory that an engine may take."""
        return min(_USUAL, self.free / self.total - _MARGIN)


def choose(engine: EngineSettings) -> tuple[EngineSettings, str | None]:
    """Settings with the memory share that is free, and CUDA_VISIBLE_DEVICES for the engine.

    None where the user chose already or there is no choice. Raises EnvironmentNotReady if too few GPUs have free memory.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return engine, None
    found = parse(gpus.probe(QUERY) or "")
    return freest(engine, found) if found else (engine, None)


def freest(engine: EngineSettings, found: Sequence[Device]) -> tuple[EngineSettings, str]:
    """The choice among `found`. Raises EnvironmentNotReady if too few have free memory."""
    chosen = sorted(found, key=lambda device: (-device.share, device.index))[: engine.tensor_parallel]
    share = min(device.share for device in chosen)
    if len(chosen) < engine.tensor_parallel:
        raise EnvironmentNotReady(f"--tp {engine.tensor_parallel}: this machine has {counted(len(found), 'GPU')}")
    if share < _LEAST:
        free = ", ".join(f"{device.index}: {device.free / 1024:.1f} GiB" for device in found)
        hint = "wait for what runs there (`nvidia-smi` names it), or CUDA_VISIBLE_DEVICES= for a CPU build of vLLM"
        raise EnvironmentNotReady(f"no GPU has room for an engine; free memory by GPU: {free}", hint=hint)
    if engine.gpu_memory_utilization is None:
        engine = dataclasses.replace(engine, gpu_memory_utilization=round(share, 2))
    return engine, ",".join(str(device.index) for device in sorted(chosen, key=lambda device: device.index))


def parse(text: str) -> list[Device]:
    """GPUs in the answer of `nvidia-smi`; lines that describe none are passed over."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    numbers = [list(map(int, row)) for row in rows if len(row) == 3 and all(part.isdigit() for part in row)]
    return [Device(*row) for row in numbers if row[1]]

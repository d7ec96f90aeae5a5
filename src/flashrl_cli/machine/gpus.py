"""The NVIDIA GPUs of this machine, as `nvidia-smi` lists them, and the driver versions that they need."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.machine.finding import Finding, fail, ok, warn
from flashrl_cli.precision import KV_CACHES, PRECISIONS, Capabilities
from flashrl_cli.text import counted

QUERY = ("--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits")
DRIVERS = {13: 580, 12: 525}
"""Oldest driver of each major CUDA version (NVIDIA's CUDA compatibility guide, minor version compatibility)."""
PINNED_CUDA = 13
"""CUDA version of the pinned torch wheel (its nvidia-cuda-runtime in requirements/gpu.txt)."""


COMPATIBLE = Path("/usr/local/cuda/compat")
"""NVIDIA's cuda-compat, with which an older driver of a data-centre GPU supports a newer CUDA."""


NOTHING: Mapping[str, str] = MappingProxyType({})
AMD = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: name, compute capability, driver version and memory in MiB."""

    name: str
    capability: tuple[int, int]
    driver: str
    memory_mib: int


def probe(query: Sequence[str] = QUERY) -> str | None:
    """The output of `nvidia-smi` for `query`, or its error message; None if it is not installed."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        listing = subprocess.run(
            [command, *query], capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=False
        )
    except subprocess.TimeoutExpired:
        return "no answer within 30 s"
    return listing.stdout + listing.stderr


def parse(text: str | None) -> list[Gpu]:
    """GPUs in the output of `nvidia-smi`; lines that describe no GPU (errors, MIG slices) are skipped."""
    return [gpu for line in (text or "").splitlines() if (gpu := _gpu(line)) is not None]


def visible(gpus: Sequence[Gpu], allowed: str | None) -> list[Gpu]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` leaves visible.

    Indices select GPUs; of UUIDs only their number is used.
    """
    if allowed is None:
        return list(gpus)
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    if all(name.isdigit() for name in names):
        return [gpus[int(name)] for name in names if int(name) < len(gpus)]
    return list(gpus[: len([name for name in names if not name.startswith("-")])])


def seen() -> list[Gpu]:
    """The GPUs of this machine that processes started here may use."""
    return visible(parse(probe()), os.environ.get("CUDA_VISIBLE_DEVICES"))


def vendors(
    environment: Mapping[str, str], count: int | None, *, preset: Mapping[str, str] = NOTHING
) -> Iterator[Finding]:
    """Yield failures for AMD device variables that crash verl's workers (verl/single_controller/base/worker.py:231).

    `count` is the number of a run's devices per node, None if unknown; `preset` are the variables of its `env`. Ray
    sets CUDA_VISIBLE_DEVICES for every worker that has a device, on the CPU stack, too. An empty variable is ignored.
    """
    ray_sets = not environment.get("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES")
    cuda = environment.get("CUDA_VISIBLE_DEVICES") or ("0" if ray_sets else "")
    hip, rocr = (environment.get(name) for name in AMD)
    for name, ends in zip(
        AMD, (hip and cuda and (hip != cuda or "," in hip or (count or 1) > 1), rocr and (cuda or hip)), strict=True
    ):
        if ends:
            text = (
                f"{name}={environment[name]} beside CUDA_VISIBLE_DEVICES, which Ray sets for each worker, "
                "ends verl's workers"
            )
            yield fail(name, text, f"take env.{name} out of the preset" if name in preset else f"unset {name}")


def driver(gpus: Sequence[Gpu], cuda: int, *, compatible: bool) -> Iterator[Finding]:
    """Yield whether the driver is new enough for torch's CUDA; `compatible` says that cuda-compat is installed."""
    if not gpus:
        return
    version, least = gpus[0].driver, DRIVERS.get(cuda, DRIVERS[PINNED_CUDA])
    if _number(version) >= least:
        yield ok("driver", version)
    elif compatible:
        yield warn(
            "driver", f"{version} is older than {least}; cuda-compat has to bridge it", f"driver {least} or newer"
        )
    else:
        yield fail(
            "driver", f"{version}: torch's CUDA {cuda} needs {least} or newer", f"install driver {least} or newer"
        )


def cuda_of(torch: str) -> int:
    """Major CUDA version of a torch build: 12 for `2.11.0+cu128`, the pinned one without a local version part."""
    _, _, local = torch.partition("+cu")
    return int(local[:2]) if local[:2].isdigit() else PINNED_CUDA


def gpus_lack(precision: str, found: Sequence[Gpu], kv_cache: str = "auto") -> Iterator[Finding]:
    """Yield a failure if some GPU has no kernel for a precision or a KV cache in 8 bits, with an alternative."""
    if reason := lacks(precision, found):
        yield fail("rollout.precision", reason, f"--rollout {PRECISIONS[precision].instead}")
    cache = KV_CACHES.get(kv_cache)
    if cache and (reason := outside(cache.gpus, f"a KV cache in {kv_cache}", found)):
        able = (name for name, row in KV_CACHES.items() if outside(row.gpus, name, found) is None)
        yield fail("rollout.kv_cache", reason, f"--set rollout.kv_cache={next(able, 'auto')}")


def lacks(precision: str, gpus: Sequence[Gpu]) -> str | None:
    """Why some of these GPUs cannot compute in a precision; None if all can."""
    return outside(PRECISIONS[precision].gpus, precision, gpus)


def outside(bounds: Capabilities, what: str, gpus: Sequence[Gpu]) -> str | None:
    """Why some of these GPUs are not within `bounds`; None if all are."""
    for gpu in gpus:
        have = f"{gpu.name} has {dotted(gpu.capability)}"
        if gpu.capability < bounds.least:
            return f"{what} needs compute capability {dotted(bounds.least)} or newer, {have}"
        if bounds.below and gpu.capability >= bounds.below:
            return f"{what} has kernels for compute capabilities below {dotted(bounds.below)} only, {have}"
    return None


def _gpu(line: str) -> Gpu | None:
    fields = [field.strip() for field in line.rsplit(",", 3)]
    if len(fields) != 4 or not fields[3].isdigit():
        return None
    major, _, minor = fields[1].partition(".")
    if not (major.isdigit() and minor.isdigit()):
        return None
    return Gpu(fields[0], (int(major), int(minor)), fields[2], int(fields[3]))


def dotted(capability: tuple[int, int]) -> str:
    """A compute capability as NVIDIA writes it: 9.0."""
    return ".".join(map(str, capability))


def _number(version: str) -> int:
    """Branch number of a driver version: 580 for 580.65.06."""
    branch = version.partition(".")[0]
    return int(branch) if branch.isdigit() else 0


_FREE = ("--query-gpu=index,memory.total,memory.free", "--format=csv,noheader,nounits")
_USUAL = 0.9
"""vLLM's default gpu_memory_utilization."""
_MARGIN = 0.03
"""Fraction of the memory that stays free beside the engine and other processes."""
_LEAST = 0.1
"""Least fraction of free memory with which a GPU is used."""


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Total and free memory of a GPU in MiB; `index` is the GPU's index."""

    index: int
    total: int
    free: int

    @property
    def share(self) -> float:
        """Fraction of its memory that an engine may take."""
        return min(_USUAL, self.free / self.total - _MARGIN)


def choose_free(count: int, share: float | None) -> tuple[str | None, float | None]:
    """Choose the `count` GPUs with the most free memory, so that an engine does not disturb a training run.

    Returns CUDA_VISIBLE_DEVICES for the engine, None if it is already set or there is no GPU, and the fraction of their
    memory that the engine may take: `share` if it is given. Raises EnvironmentNotReady if too few GPUs have free
    memory.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return None, share
    found = parse_free(probe(_FREE) or "")
    return freest(count, share, found) if found else (None, share)


def places(engines: int | None, each: int, share: float | None) -> list[tuple[str | None, float | None]]:
    """What `choose_free` returns for each of several engines on `each` GPUs of their own; None: as many as have room.

    Without a GPU, `engines` processes share the CPU. Raises EnvironmentNotReady if too few GPUs have free memory, and
    for all GPUs of a machine that has none.
    """
    if engines == 1:
        return [choose_free(each, share)]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    found: list[tuple[str, float | None]]
    if allowed is None:
        there = parse_free(probe(_FREE) or "")
        found = [(str(gpu.index), share or round(gpu.share, 2)) for gpu in there if gpu.share >= _LEAST]
        without = not there
    else:
        names = [name.strip() for name in allowed.split(",")]
        found = [(name, share) for name in names if name and not name.startswith("-")]
        without = not found
    if without and engines is not None:
        return [(None, share)] * engines
    count = len(found) // each if engines is None else engines
    if not count or count * each > len(found):
        asked = "all" if engines is None else engines * each
        hint = "`nvidia-smi` names what runs on the others" if allowed is None else "more GPUs in CUDA_VISIBLE_DEVICES"
        what = f"--gpus {asked}, {counted(each, 'GPU')} for an engine: {counted(len(found), 'GPU')} with free memory"
        raise EnvironmentNotReady(what, hint=hint)
    groups = [found[first : first + each] for first in range(0, count * each, each)]
    return [(",".join(name for name, _ in group), min((s for _, s in group if s), default=None)) for group in groups]


def parse_free(text: str) -> list[FreeMemory]:
    """GPUs in the output of `nvidia-smi`; lines that describe no GPU are skipped."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    numbers = [list(map(int, row)) for row in rows if len(row) == 3 and all(part.isdigit() for part in row)]
    return [FreeMemory(*row) for row in numbers if row[1]]


def freest(count: int, share: float | None, found: Sequence[FreeMemory]) -> tuple[str, float]:
    """The choice of `choose_free` among the GPUs `found`. Raises EnvironmentNotReady if too few have free memory."""
    if len(found) < count:
        raise EnvironmentNotReady(f"--tp {count}: this machine has {counted(len(found), 'GPU')}")
    chosen = sorted(found, key=lambda gpu: (-gpu.share, gpu.index))[:count]
    least = min(gpu.share for gpu in chosen)
    if least < _LEAST:
        free = ", ".join(f"{gpu.index}: {gpu.free / 1024:.1f} GiB" for gpu in found)
        hint = "wait for what runs there (`nvidia-smi` names it), or CUDA_VISIBLE_DEVICES= for a CPU build of vLLM"
        raise EnvironmentNotReady(f"no GPU has room for an engine; free memory by GPU: {free}", hint=hint)
    visible = ",".join(str(index) for index in sorted(gpu.index for gpu in chosen))
    return visible, round(least, 2) if share is None else share

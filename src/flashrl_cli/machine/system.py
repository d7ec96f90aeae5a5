"""Processors, disk, shared memory, memory and limits of this machine.

Is there room for what a run writes: its checkpoints, and the models that it downloads?
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.machine.finding import Finding, fail, ok, warn

GIB = 2**30
TMP = "/tmp"  # noqa: S108 - where Ray, Python and verl go without a variable
PYTHON_TMP = ("TMPDIR", "TEMP", "TMP")
SOCKET_BYTES = 107 if sys.platform == "linux" else 103
"""Longest path of a socket (`sun_path` of unix(7), less its end); Ray asks for it in ray/_private/utils.py:1750."""
SHM = Path("/dev/shm")  # noqa: S108 - where shared memory is mounted
CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
DISK_GIB = {"gpu": 50, "cpu": 5}
"""Free disk below which a stack's runs get tight: weights and checkpoints of billions of parameters, or of toys."""
RAY_DISK_SHARE = 0.95
"""Share of a disk in use above which Ray refuses to spill objects (RAY_local_fs_capacity_threshold)."""
RAY_MEMORY_SHARE = 0.3
RAY_SHM = 10 * 10**9
"""Ray's object store takes 30 % of the memory; if /dev/shm has less and less than 10 GB, it goes to disk
(ray/_private/utils.py:614, ray/_private/services.py:2227)."""
MEMORY_GIB = 8
OPEN_FILES = {"gpu": 65536, "cpu": 4096}
"""Ray's recommendation; few workers need few."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system: what is kept there, bytes free and in all, and the folders among them that cannot be written."""

    holds: str
    free: int
    total: int
    unwritable: tuple[str, ...] = ()


def probe_disks(places: Mapping[str, Path]) -> list[Disk]:
    """File systems of named folders that may not exist yet, each once."""
    grouped: dict[int, dict[str, Path]] = {}
    for name, path in places.items():
        parent = existing(path)
        grouped.setdefault(parent.stat().st_dev, {})[name] = parent
    return [_disk(folders) for folders in grouped.values()]


def existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def has_avx512(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's processors have AVX-512; no where they cannot be asked."""
    try:
        return "avx512f" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def cpu_lacks(precision: str, *, kv8: bool = False) -> Iterator[Finding]:
    """Yield what the engine has no code for on a CPU, of a precision and of an FP8 KV cache, and what to take there."""
    if precision.startswith("fp8"):
        yield fail(
            "rollout.precision",
            "FP8 rollouts need a GPU (compute capability 8.9 or newer)",
            "`--rollout int8` runs on a CPU",
        )
    if kv8 and not has_avx512():
        # vllm/v1/attention/backends/cpu_attn.py:510 in 0.28
        yield fail("rollout.kv_cache", "vLLM's FP8 KV cache needs AVX-512 on a CPU", "--set rollout.kv_cache=auto")


def probe_memory() -> int:
    """Bytes of memory that processes here may use: the machine's, or the container's if that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        limit = CGROUP_MEMORY.read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def probe_shm() -> int:
    """Bytes free in shared memory, 0 where there is none."""
    return shutil.disk_usage(SHM).free if SHM.is_dir() else 0


def probe_limits() -> tuple[int, int]:
    """Soft limits of this process: open files, and bytes of locked memory (-1 for none)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]


def sockets(environment: Mapping[str, str], *, training: bool = True) -> Iterator[Finding]:
    """Yield what keeps vLLM, Python's pools of processes and, when `training`, verl's weight transfer from making their sockets.

    Python makes them in its folder for temporary files (`pymp-…/listener-…`), vLLM there or in VLLM_RPC_BASE_PATH, named by a UUID
    (vllm/utils/network_utils.py), verl in /tmp whatever is set (verl/workers/rollout/vllm_rollout/vllm_rollout.py:141).
    """
    name = next((name for name in PYTHON_TMP if (path := environment.get(name)) and _takes_files(path)), TMP)
    places = {name: "/pymp-12345678/listener-12345678"}
    places |= {"VLLM_RPC_BASE_PATH" if environment.get("VLLM_RPC_BASE_PATH") else name: f"/{uuid.UUID(int=0)}"}
    for place, rest in places.items():
        folder = environment.get(place, TMP)
        longest = len(os.fsencode(folder + rest))
        if longest > SOCKET_BYTES:
            text = f"{folder} ({place}) is {longest - SOCKET_BYTES} bytes too long for the sockets of vLLM and of Python's processes"
            yield fail("sockets", text, f"a shorter {place}, such as `export {place}=/tmp`")
    if training and not _takes_files(TMP):
        yield fail(
            "sockets", f"verl sends weights through sockets in {TMP}, which cannot be written", f"make {TMP} writable"
        )


def check_sockets(environment: Mapping[str, str]) -> None:
    """Raise EnvironmentNotReady if engines and graders that are started in `environment` could not make their sockets."""
    for finding in sockets(environment, training=False):
        raise EnvironmentNotReady(finding.text, hint=finding.fix)


def _takes_files(folder: str) -> bool:
    return Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)


def disks(found: Sequence[Disk], stack: str) -> Iterator[Finding]:
    """Yield how each file system stands; `stack` is `gpu` or `cpu`."""
    for disk in found:
        text = f"{disk.free / GIB:.0f} GiB free of {disk.total / GIB:.0f} for {disk.holds}"
        if disk.unwritable:
            yield fail(
                "disk",
                f"cannot write to {', '.join(disk.unwritable)}",
                "FLASHRL_RUNS, FLASHRL_CHECKPOINTS, FLASHRL_DATA or HF_HOME",
            )
        elif disk.free < GIB:
            yield fail("disk", text, "free some space")
        elif disk.free < DISK_GIB[stack] * GIB:
            yield warn("disk", f"{text}; less than {DISK_GIB[stack]} GiB get tight", "free some space")
        elif disk.free < (1 - RAY_DISK_SHARE) * disk.total:
            yield warn("disk", f"{text}; Ray spills nothing to a disk that is over 95 % full", "free some space")
        else:
            yield ok("disk", text)


def shared_memory(free: int, memory: int, stack: str) -> Finding:
    """Whether Ray's object store, NCCL and data loaders find the shared memory that they ask for, all in bytes."""
    wanted = min(RAY_MEMORY_SHARE * memory, RAY_SHM)
    if stack == "gpu":
        wanted = max(wanted, 8 * GIB)
    text = f"{free / GIB:.1f} GiB free in {SHM}"
    if free >= wanted:
        return ok("shared memory", text)
    fix = f"docker run --shm-size={wanted / GIB:.0f}g, or mount -o remount,size={wanted / GIB:.0f}g {SHM}"
    return warn("shared memory", f"{text}; Ray wants {wanted / GIB:.1f} GiB and goes to disk otherwise", fix)


def memory(total: int) -> Finding:
    """Whether there is memory for a trainer and an engine beside each other."""
    text = f"{total / GIB:.0f} GiB"
    if total >= MEMORY_GIB * GIB:
        return ok("memory", text)
    return warn("memory", f"{text}; below {MEMORY_GIB} GiB workers get killed", None)


def limits(open_files: int, locked: int, stack: str) -> Iterator[Finding]:
    """Yield how the limits of this shell stand, which everything that is started inherits (-1 for no limit)."""
    wanted = OPEN_FILES[stack]
    if open_files == resource.RLIM_INFINITY or open_files >= wanted:
        yield ok("open files", "no limit" if open_files == resource.RLIM_INFINITY else f"{open_files}")
    else:
        yield warn("open files", f"{open_files}; Ray's many workers want {wanted}", f"ulimit -n {wanted}")
    if stack == "gpu":
        text = (
            "no limit" if locked == resource.RLIM_INFINITY else f"{locked / 2**20:.0f} MiB; InfiniBand wants no limit"
        )
        yield ok("locked memory", text)


def _disk(folders: Mapping[str, Path]) -> Disk:
    usage = shutil.disk_usage(next(iter(folders.values())))
    unwritable = tuple(str(path) for path in dict.fromkeys(folders.values()) if not os.access(path, os.W_OK))
    return Disk(", ".join(folders), usage.free, usage.total, unwritable)


def checkpoints(one: int, kept: int | None, free: int, *, nodes: int, folder: str, keep_fewer: str) -> Finding:
    """Whether checkpoints of `one` byte size fit into `free` bytes; `kept` is their number, None for an unknown one.

    Each node writes its own share; whether to one disk or its own cannot be seen here, so only a share that does not fit is certain.
    """
    if kept == 0:
        return ok("checkpoints", "none are saved")
    number = f"{kept} checkpoints" if kept and kept > 1 else "a checkpoint"
    text = f"{number} of {size(one)} in {folder}, {size(free)} free"
    if free < one / nodes:
        return fail("checkpoints", text, "FLASHRL_CHECKPOINTS names a folder on a larger disk")
    if free < one * (kept or 1):
        return warn("checkpoints", text, f"{keep_fewer}, or FLASHRL_CHECKPOINTS names a larger disk")
    if kept is None:
        return ok("checkpoints", f"{text}, room for {free // one if one else 'any'}; all are kept")
    return ok("checkpoints", text)


def download(name: str, model: str, needed: int | None, free: int, cache: str) -> Finding:
    """Whether a model that is to be downloaded fits; `needed` is its bytes, None where nobody knows here."""
    if needed is None:
        return ok(name, f"{model} will be downloaded to {cache}")
    text = f"{model} will be downloaded to {cache}: {size(needed)}, {size(free)} free"
    return fail(name, text, "HF_HOME names a folder on a larger disk") if free < needed else ok(name, text)


def size(count: int) -> str:
    """Bytes for people: `393 GB`, `4.4 MB`."""
    for unit, step in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count / 1000:.3g} kB"

"""Checks of this machine's processors, socket paths and disk space for checkpoints and downloads."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.machine.finding import Finding, fail, ok, warn
from flashrl_cli.precision import KV_CACHES, PRECISIONS
from flashrl_cli.text import size

TMP = "/tmp"  # noqa: S108 - default folder of Ray, Python and verl
PYTHON_TMP = ("TMPDIR", "TEMP", "TMP")
SOCKET_BYTES = 107 if sys.platform == "linux" else 103
"""Maximum length of a socket's path (`sun_path` of unix(7), without its terminator); Ray checks it in
ray/_private/utils.py:1750.
"""


def has_avx512(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's processors have AVX-512; False if that cannot be determined."""
    try:
        return "avx512f" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def cpu_lacks(precision: str, kv_cache: str = "auto") -> Iterator[Finding]:
    """Yield a failure if vLLM has no CPU kernel for a precision or a KV cache in 8 bits, with an alternative."""
    row = PRECISIONS[precision]
    if not row.cpu:
        yield fail(
            "rollout.precision",
            f"{row.number_format} rollouts need a GPU "
            f"(compute capability {'.'.join(map(str, row.gpus.least))} or newer)",
            f"`--rollout {row.instead}` runs on a CPU",
        )
    cache = KV_CACHES.get(kv_cache)
    if cache and not cache.cpu:
        yield fail("rollout.kv_cache", f"vLLM has no {kv_cache} KV cache on a CPU", "--set rollout.kv_cache=auto")
    elif cache and not has_avx512():
        # vllm/v1/attention/backends/cpu_attn.py:510 in 0.28
        yield fail("rollout.kv_cache", "vLLM's FP8 KV cache needs AVX-512 on a CPU", "--set rollout.kv_cache=auto")


def sockets(environment: Mapping[str, str], *, training: bool = True) -> Iterator[Finding]:
    """Yield failures if vLLM, Python's process pools or verl's weight transfer (`training`) cannot create sockets.

    Python creates them in its folder for temporary files (`pymp-…/listener-…`), vLLM there or in VLLM_RPC_BASE_PATH,
    named by a UUID (vllm/utils/network_utils.py), and verl always in /tmp
    (verl/workers/rollout/vllm_rollout/vllm_rollout.py:141).
    """
    name = next((name for name in PYTHON_TMP if (path := environment.get(name)) and _takes_files(path)), TMP)
    places = {name: "/pymp-12345678/listener-12345678"}
    places |= {"VLLM_RPC_BASE_PATH" if environment.get("VLLM_RPC_BASE_PATH") else name: f"/{uuid.UUID(int=0)}"}
    for place, rest in places.items():
        folder = environment.get(place, TMP)
        longest = len(os.fsencode(folder + rest))
        if longest > SOCKET_BYTES:
            text = (
                f"{folder} ({place}) is {longest - SOCKET_BYTES} bytes too long "
                "for the sockets of vLLM and of Python's processes"
            )
            yield fail("sockets", text, f"a shorter {place}, such as `export {place}=/tmp`")
    if training and not _takes_files(TMP):
        yield fail(
            "sockets", f"verl sends weights through sockets in {TMP}, which cannot be written", f"make {TMP} writable"
        )


def check_sockets(environment: Mapping[str, str]) -> None:
    """Raise EnvironmentNotReady if engines and graders could not create their sockets in this `environment`."""
    for finding in sockets(environment, training=False):
        raise EnvironmentNotReady(finding.text, hint=finding.fix)


def _takes_files(folder: str) -> bool:
    return Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)


def checkpoints(one: int, kept: int | None, free: int, *, nodes: int, folder: str, keep_fewer: str) -> Finding:
    """Whether checkpoints of `one` bytes each fit into `free` bytes; `kept` is their number, None if unknown.

    Each node writes its own share. Whether the nodes share a disk cannot be seen here, so the check fails only if a
    single share does not fit.
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
    """Whether a model that must be downloaded fits; `needed` is its size in bytes, None if unknown here."""
    if needed is None:
        return ok(name, f"{model} will be downloaded to {cache}")
    text = f"{model} will be downloaded to {cache}: {size(needed)}, {size(free)} free"
    return fail(name, text, "HF_HOME names a folder on a larger disk") if free < needed else ok(name, text)

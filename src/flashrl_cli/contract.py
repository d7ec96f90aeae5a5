"""What the command line and the plugins inside verl and vLLM agree on: environment variables, handshake files, class names.

Standard library only: the plugins import it in every worker.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files

if TYPE_CHECKING:
    import logging

ENV_PLUGIN_DIR = "FLASHRL_PLUGIN_DIR"
"""Folder for handshake files. Unset means: not a run of flashrl's, and the plugins do nothing."""
ENV_PLATFORM = "FLASHRL_PLATFORM"
"""`cpu` or `cuda`: which platform the plugins prepare verl for."""
ENV_ROLLOUT = "FLASHRL_ROLLOUT"
"""A RolloutOptions as JSON: what the plugins do to a rollout engine beside its precision. Unset means: nothing."""
ENV_LOGGING = "FLASHRL_LOGGING_LEVEL"
"""How much the plugins log of what they do: `DEBUG`, `INFO`, or `WARNING` where it is unset."""
ENV_PRINT = "FLASHRL_TELL"
"""Set where the launcher cannot see the folder: workers print their handshakes, too."""
HANDSHAKE_MARK = "FLASHRL_HANDSHAKE "
"""Begins a printed handshake; Ray and vLLM put prefixes before it."""

VLLM = ((0, 24), (0, 28))
"""First and last version of vLLM whose insides the plugins were read against: those of the two pinned stacks."""
VLLM_NAMES = f"vLLM {VLLM[0][0]}.{VLLM[0][1]} to {VLLM[1][0]}.{VLLM[1][1]}"
CACHE_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Values of `model_type` whose queries, keys and values are known to stay within the bound of an FP8 KV cache
(plugins/kv_scales.py).
"""
WORKER_EXTENSION = "flashrl_cli.plugins.verl_refit.RefitWorkerExtension"
"""Class that verl's vLLM workers take their weight update from."""
CHECKED_EXTENSION = "flashrl_cli.plugins.verl_refit.CheckedWorkerExtension"
"""The same where verl's own weight update is taken as it is, but for a check that every parameter was written."""
EVAL_EXTENSION = "flashrl_cli.plugins.disk_refit.DiskRefitExtension"
"""Class that evaluation engines take new weights from, read from disk."""
BENCH_EXTENSION = "flashrl_cli.plugins.disk_refit.BenchExtension"
"""Class that the engines of the benchmark are measured through."""
BLOCKS_EXTENSION = "flashrl_cli.plugins.verl_blocks.BlocksExtension"
"""The same for FP8 in blocks, whose weights come by verl's own code."""

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """What a rollout engine does beside its precision.

    `profile` is the absolute path of a smoothing profile; `bf16_replicas` is how many replicas, the first ones, stay in
    bf16; `bf16_transfer` has the trainer send its weights in bf16.
    """

    profile: str | None = None
    bf16_replicas: int = 0
    lm_head_fp32: bool = False
    bf16_transfer: bool = False

    def text(self) -> str:
        """The value of ENV_ROLLOUT: what differs from the defaults."""
        usual = asdict(type(self)())
        return json.dumps({key: value for key, value in asdict(self).items() if value != usual[key]})

    @classmethod
    def here(cls) -> RolloutOptions:
        """Options of this process's engine, from its environment."""
        text = os.environ.get(ENV_ROLLOUT)
        return cls(**json.loads(text)) if text else cls()


PLAIN = RolloutOptions()
"""Nothing beside the precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """What one rollout worker really runs, written after its first refit and renewed at each later one.

    `quantized_layers` counts linear layers whose weights are held in `precision`; `quantized_bytes` is the size of
    those weights; `kernel` names vLLM's kernel class; `refit_s` is the last weight update's seconds. `kv_cache` is the
    cache's dtype as vLLM names it, `lm_head` the dtype in which logits are computed, `smoothed` counts tensors that a
    profile changed, and `received` names the dtypes that the weights came in.
    """

    host: str
    pid: int
    precision: str
    quantized_layers: int
    linear_layers: int
    quantized_bytes: int
    kernel: str
    vllm: str
    torch: str
    device: str
    refits: int
    refit_s: float
    kv_cache: str = "auto"
    lm_head: str = "bf16"
    smoothed: int = 0
    received: str = ""
    schema_version: int = SCHEMA_VERSION


def knows_vllm(version: str) -> bool:
    """Whether the plugins are made for a version of vLLM, such as `0.24.0` or `0.28.0+cpu`."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and VLLM[0] <= (int(numbers[1]), int(numbers[2])) <= VLLM[1]


def require_vllm(version: str) -> None:
    """Raise RuntimeError for a version of vLLM that the plugins are not made for."""
    if not knows_vllm(version):
        raise RuntimeError(f"flashrl's rollouts are made for {VLLM_NAMES}, and this is {version}")


@functools.cache
def logger() -> logging.Logger:
    """The plugins' logger, at the level that ENV_LOGGING names; its lines go to stderr, where verl and vLLM write theirs."""
    import logging

    found = logging.getLogger("flashrl")
    name = os.environ.get(ENV_LOGGING, "").upper()
    found.setLevel(logging.getLevelNamesMapping().get(name, logging.WARNING))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("flashrl %(levelname)s [%(process)d] %(message)s"))
    found.addHandler(handler)
    # verl and vLLM configure the root logger, each in its own way
    found.propagate = False
    return found


def plugin_dir() -> Path | None:
    """Folder for handshake files in this process, or None outside a flashrl run."""
    value = os.environ.get(ENV_PLUGIN_DIR)
    return Path(value) if value else None


def write_handshake(folder: Path, handshake: Handshake) -> None:
    """Write `<host>-<pid>.json` atomically; print it, too, where the launcher asks for that."""
    files.write_json(folder / f"{handshake.host}-{handshake.pid}.json", asdict(handshake))
    if os.environ.get(ENV_PRINT):
        print(HANDSHAKE_MARK + json.dumps(asdict(handshake)), flush=True)


def printed_handshake(line: str) -> Handshake | None:
    """The handshake that a line of a log holds, None for any other line or one of another schema version."""
    _, mark, text = line.partition(HANDSHAKE_MARK)
    if not mark:
        return None
    try:
        return _handshake(json.loads(text))
    except (ValueError, TypeError, AttributeError):
        return None


def read_handshakes(folder: Path) -> Iterator[Handshake]:
    """Yield the handshakes found in `folder`; a file of another schema version is passed over."""
    for path in sorted(folder.glob("*.json")):
        handshake = _handshake(json.loads(path.read_text(encoding="utf-8")))
        if handshake is not None:
            yield handshake


def _handshake(data: dict[str, Any]) -> Handshake | None:
    return Handshake(**data) if data.get("schema_version") == SCHEMA_VERSION else None


THREADS = {"GOMP_SPINCOUNT": "1000"}
"""Waiting OpenMP threads spin shortly, then sleep.

Several processes share the cores here, and a thread that spins keeps the one it waits for from running: on two cores
with one busy process beside it, training the tiny policy took 14 times as long with libgomp's own count, and not longer
than its share with this one. To be set before torch is imported.
"""
KV_CACHE_GIB = 1
"""vLLM's KV cache on a CPU, in GiB: its default is far more than small models need."""
ENGINE = {**THREADS, "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB)}
"""For processes that start a vLLM engine."""

"""The contract between the command line and the plugins in verl and vLLM.

It covers environment variables, handshake files, class names and supported versions. It uses the standard library only,
because the plugins import it in every worker.
"""

from __future__ import annotations

import functools
import importlib.abc
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files

if TYPE_CHECKING:
    import logging
    from types import ModuleType

ENV_PLUGIN_DIR = "FLASHRL_PLUGIN_DIR"
"""Folder for handshake files. If it is unset, the process does not belong to a flashrl run and the plugins do nothing.
"""
ENV_PLATFORM = "FLASHRL_PLATFORM"
"""The platform for which the plugins prepare verl: `cpu` or `cuda`."""
ENV_ROLLOUT = "FLASHRL_ROLLOUT"
"""RolloutOptions as JSON: what the plugins change in a rollout engine besides its precision. If it is unset, they
change nothing.
"""
ENV_LOGGING = "FLASHRL_LOGGING_LEVEL"
"""Logging level of the plugins: `DEBUG`, `INFO`, or `WARNING` (the default)."""
ENV_PRINT = "FLASHRL_TELL"
"""Set if the launcher cannot read the handshake folder: workers then print their handshakes as well."""
ENV_FORK = "FLASHRL_FORK"
"""`1` lets a run on this machine start its processes as forks of one that has imported their modules."""
ENV_KEEP = "FLASHRL_KEEP_RESPONSES"
"""Number of responses a step whose log-ratios verl's trainer keeps (plugins/log_ratios.py); none if it is unset."""
ENV_SAMPLES = "FLASHRL_KEEP_SAMPLES"
"""Number of responses a step that verl's trainer keeps as text (plugins/samples.py); none if it is unset."""
ENV_REWARD = "FLASHRL_REWARD"
"""The user's reward function as JSON (reward_function.Shipped); verl's scorers are used if it is unset."""
ENV_SERVER = "FLASHRL_FORKSERVER"
"""Name of that process's socket in Linux' abstract namespace, set by the guardian of the run."""
HANDSHAKE_MARK = "FLASHRL_HANDSHAKE "
"""Start of a printed handshake within its line; Ray and vLLM put prefixes before it."""

VLLM = ((0, 24), (0, 28))
"""First and last supported version of vLLM. The plugins depend on vLLM internals, which were checked in the versions of
the two pinned stacks.
"""
VERL = "0.9.1"
"""The supported version of verl, which the plugins change in places that were checked in it."""
PATCHED = "_flashrl_patched"
"""Attribute of the functions that replace functions of verl, vLLM or torch."""
VLLM_NAMES = f"vLLM {VLLM[0][0]}.{VLLM[0][1]} to {VLLM[1][0]}.{VLLM[1][1]}"
CACHE_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Values of `model_type` for which the scales of an FP8 KV cache can be bounded (plugins/kv_scales.py)."""
WORKER_EXTENSION = "flashrl_cli.plugins.verl_refit.RefitWorkerExtension"
"""vLLM worker extension that gives verl's rollout workers flashrl's weight update."""
CHECKED_EXTENSION = "flashrl_cli.plugins.verl_refit.CheckedWorkerExtension"
"""vLLM worker extension that uses verl's own weight update and checks that it wrote every parameter."""
EVAL_EXTENSION = "flashrl_cli.plugins.disk_refit.DiskRefitExtension"
"""vLLM worker extension of evaluation engines, which read new weights from disk."""
BENCH_EXTENSION = "flashrl_cli.plugins.disk_refit.BenchExtension"
"""vLLM worker extension through which the benchmark measures its engines."""
BLOCKS_EXTENSION = "flashrl_cli.plugins.verl_blocks.BlocksExtension"
"""vLLM worker extension of the benchmark for block-wise FP8, whose weights are quantized and loaded by verl's code."""
SAMPLER = ("pkg://flashrl_cli.plugins.sampler", "quick_buffer")
"""Module and function by which verl's trainer gets its replay buffer."""
AGENT_LOOPS = "flashrl_cli.plugins.agent_loop.AgentLoopManager"
"""Class by which verl's trainer has responses generated, scored and stored."""
CHECKPOINT_ENGINE = ("gloo", "flashrl_cli.plugins.checkpoint_engine")
"""Name of flashrl's engine for weight updates between processes that share no device, and the module that registers it.
"""
REWARD = ("pkg://flashrl_cli.plugins.reward", "compute_score")
"""Module and function by which verl's reward workers call a reward function of the user's."""
TOKENS_A_MESSAGE = 16
"""Tokens of a sequence that a rollout engine collects before it sends them to verl's server (plugins/outputs.py)."""

MIXTURE = ("pkg://flashrl_cli.plugins.mixture", "MixedDataset")
"""Module and class by which verl's trainer reads the rows of several data files."""
SHARES = "flashrl_shares"
"""Key of verl's `data` with the shares of the training files."""
GYM_SOURCE = "reasoning_gym/"
"""Start of the data source of generated tasks, followed by the task's name (plugins/scorers.py)."""
EXACT_SOURCE = "flashrl/exact"
"""Data source of rows whose answer is the response itself (plugins/scorers.py)."""

REFIT = "refit/"
"""Prefix of the names under which verl logs the figures of a weight update."""
ARRIVAL = ("codes_changed", "weights_changed", "arrived", "update_cosine")
"""Figures of plugins/arrival.py that verl logs, under flashrl's names."""

SUPPORT = "flashrl_cli.plugins.support"
"""Module that verl imports in every process of a run whose log-probs are over the kept tokens."""
MOST_KEPT = 128
"""Largest top-k whose kept tokens are carried from the engine to the trainer: 1 KiB a token of a response."""


def kept_columns(top_k: int) -> int:
    """Number of the most probable tokens that the engine is asked for, of which at most `top_k` tokens are kept.

    More are kept if logits are equal to the last one (vllm/v1/sample/ops/topk_topp_sampler.py:431 in 0.28). Logits of
    bf16 often are: between 16 and 32 they differ by 1/8 at least.
    """
    return 2 * top_k


LOG_PROBS_CHUNK = 128 << 20
"""Bytes of float32 logits of which the trainer's log-probs and entropies are computed at a time on a GPU.

Temporaries need twice as much. A kernel then runs for some 0.1 ms, which hides its launch.
"""
LOG_PROBS_CHUNK_CPU = 2 << 20
"""The same on a CPU, where the temporaries stay in the caches, and an operation has enough to do for the threads that
it starts.
"""

SCHEMA_VERSION = 1


AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """Options of a rollout engine besides its precision.

    `profile` is the absolute path of a smoothing profile. The first `bf16_replicas` replicas stay in bf16.
    `lm_head_fp32` asks for logits in float32. `bf16_transfer` makes the trainer send its weights in bf16. `rotation` is
    the block by which INT8 layers rotate their input; 0 for none, AUTO for the largest that divides all inputs.
    """

    profile: str | None = None
    bf16_replicas: int = 0
    lm_head_fp32: bool = False
    bf16_transfer: bool = False
    rotation: int | str = AUTO

    @property
    def asked_rotation(self) -> int | str:
        """`rotation`, where AUTO is none with a profile, because a profile is made for channels that are not mixed."""
        return 0 if self.rotation == AUTO and self.profile else self.rotation

    def text(self) -> str:
        """The value of ENV_ROLLOUT: the options that differ from their defaults, as JSON."""
        usual = asdict(type(self)())
        return json.dumps({key: value for key, value in asdict(self).items() if value != usual[key]})

    @classmethod
    def here(cls) -> RolloutOptions:
        """The options of this process's engine, read from its environment."""
        text = os.environ.get(ENV_ROLLOUT)
        return cls(**json.loads(text)) if text else cls()


PLAIN = RolloutOptions()
"""Default options: nothing besides the precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """What one rollout worker really runs, written after its first refit and renewed after each later one.

    `quantized_layers` counts linear layers whose weights are held in `precision`, and `quantized_bytes` is the size of
    those weights. `kernel` is the name of vLLM's kernel class. `refit_s` is the duration of the last weight update in
    seconds. `kv_cache` is the cache's dtype as vLLM names it, `lm_head` the dtype in which logits are computed.
    `smoothed` counts the tensors that a smoothing profile changed. `rotation` is the block by which every quantized
    layer rotates its input, 0 for none. `received` names the dtypes in which the weights arrived. `arrival` holds the
    figures of plugins/arrival.py; None after the first refit, and without 8-bit weights.
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
    rotation: int = 0
    received: str = ""
    arrival: dict[str, float] | None = None
    schema_version: int = SCHEMA_VERSION


def knows_vllm(version: str) -> bool:
    """Whether the plugins support a version of vLLM, such as `0.24.0` or `0.28.0+cpu`."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and VLLM[0] <= (int(numbers[1]), int(numbers[2])) <= VLLM[1]


def require_vllm(version: str) -> None:
    """Raise RuntimeError for a version of vLLM that the plugins do not support."""
    if not knows_vllm(version):
        raise RuntimeError(f"flashrl's rollouts are made for {VLLM_NAMES}, and this is {version}")


def replace_in_verl(module: ModuleType, function: Callable[..., Any]) -> None:
    """Replace the function of this name in a module of verl's, and in those that imported it by name; marks it.

    `import verl` loads few modules before its plugins; those that it loads later take what they find. A process in
    which a plugin acts later may have loaded some.
    """
    name = function.__name__
    original = vars(module)[name]
    setattr(function, PATCHED, True)
    for other in [other for at, other in sys.modules.items() if at.startswith("verl.")]:
        if vars(other).get(name) is original:
            setattr(other, name, function)


@functools.cache
def logger() -> logging.Logger:
    """The plugins' logger, at the level that ENV_LOGGING sets.

    It writes to stderr, as verl and vLLM do.
    """
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


class _BeforeImport(importlib.abc.MetaPathFinder):
    """Finds no module, and calls `prepare` once, when `module` is looked for."""

    def __init__(self, module: str, prepare: Callable[[], None]) -> None:
        self.module, self.prepare, self.called = module, prepare, False

    def find_spec(self, fullname: str, *_: object) -> None:
        # it stays among the finders: Python is going through their list, and would leave out the next one
        if fullname == self.module and not self.called:
            self.called = True
            self.prepare()


def before_import(module: str, prepare: Callable[[], None]) -> None:
    """Call `prepare` when this process first imports `module`, before that is executed; at once if it was imported.

    Processes that never import it are left as they are. Calling this again with the same function changes nothing.
    """
    if module in sys.modules:
        prepare()
    elif not any(isinstance(finder, _BeforeImport) and finder.prepare is prepare for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeImport(module, prepare))


def plugin_dir() -> Path | None:
    """Folder for handshake files in this process, or None outside a flashrl run."""
    value = os.environ.get(ENV_PLUGIN_DIR)
    return Path(value) if value else None


def write_handshake(folder: Path, handshake: Handshake) -> None:
    """Write `<host>-<pid>.json` atomically, and print the handshake as well if ENV_PRINT is set."""
    files.write_json(folder / f"{handshake.host}-{handshake.pid}.json", asdict(handshake))
    if os.environ.get(ENV_PRINT):
        print(HANDSHAKE_MARK + json.dumps(asdict(handshake)), flush=True)


def printed_handshake(line: str) -> Handshake | None:
    """The handshake in a line of a log; None for any other line and for another schema version."""
    _, mark, text = line.partition(HANDSHAKE_MARK)
    if not mark:
        return None
    try:
        return _handshake(json.loads(text))
    except (ValueError, TypeError, AttributeError):
        return None


def read_handshakes(folder: Path) -> Iterator[Handshake]:
    """Yield the handshakes found in `folder`, skipping files of another schema version."""
    for path in sorted(folder.glob("*.json")):
        handshake = _handshake(json.loads(path.read_text(encoding="utf-8")))
        if handshake is not None:
            yield handshake


def _handshake(data: dict[str, Any]) -> Handshake | None:
    return Handshake(**data) if data.get("schema_version") == SCHEMA_VERSION else None


THREADS = {"GOMP_SPINCOUNT": "1000"}
"""Environment that makes waiting OpenMP threads spin only briefly before they sleep.

Several processes share the cores, and a spinning thread keeps the thread that it waits for from running. On two cores
with one other busy process, training the tiny policy took 14 times as long with libgomp's default spin count, and with
this one no longer than its share of the cores implies. It must be set before torch is imported.
"""
KV_CACHE_GIB = 1
"""Size of vLLM's KV cache on a CPU, in GiB. vLLM's default is far more than small models need."""
ENGINE = {**THREADS, "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB)}
"""Environment of processes that start a vLLM engine."""

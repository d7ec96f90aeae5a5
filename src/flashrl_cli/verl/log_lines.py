"""What lines of verl's, Ray's and vLLM's logs mean: the phases of a start, and the causes of a failure.

The texts are those of verl 0.9.1, Ray 2.60 and vLLM 0.24 to 0.28.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ANSI = re.compile(r"\x1b\[[0-9;]*m")

PHASES = (
    ("[validate_config] All configuration checks passed", "starting Ray"),
    ("Started a local Ray instance", "starting the trainer"),
    ("Connected to Ray cluster", "starting the trainer"),
    ("create worker group", "loading the policy"),
    ("actor and ref model engine initialized", "loading the rollout engine"),
    ("checkpoint engine manager initialized", "loading the checkpoint"),
    ("all initialize finished, ready to fit", "sending weights to the rollout engine"),
    ("Training Progress:", "sampling responses"),
)
"""Text in a log line to what is being done from then on, in the order of a start."""


TOTAL_STEPS = re.compile(r"Total training steps: (\d+)")


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a run failed, recognized by a pattern in its log; `fatal` ones end a run that does not end itself."""

    pattern: re.Pattern[str]
    what: str
    hint: str
    fatal: bool = True


def _cause(pattern: str, what: str, hint: str, *, fatal: bool = True) -> Cause:
    return Cause(re.compile(pattern), what, hint, fatal)


CAUSES = (
    _cause(
        r"torch\.(cuda\.)?OutOfMemoryError|CUDA out of memory|CUDA error: out of memory",
        "a GPU ran out of memory",
        "lower rollout.gpu_memory_utilization or the micro-batch sizes, or offload parameters and optimizer",
    ),
    _cause(
        r"ray\.exceptions\.OutOfMemoryError|exceeded the memory usage threshold|Unable to allocate|Cannot allocate memory",
        "the machine ran out of memory",
        "lower batch sizes or VLLM_CPU_KVCACHE_SPACE, or free memory on this machine",
    ),
    _cause(
        r"No space left on device",
        "a disk is full",
        "free space where checkpoints, the run's folder and /tmp (Ray) lie, and /dev/shm",
    ),
    _cause(
        r"No available memory for the cache blocks|larger than the available KV cache memory",
        "the rollout engine has no memory left for its KV cache",
        "raise rollout.gpu_memory_utilization (VLLM_CPU_KVCACHE_SPACE on a CPU) or lower data.max_response_length",
    ),
    _cause(
        r"(OSError|HTTPError|LocalEntryNotFoundError|OfflineModeIsEnabled).*(huggingface|Hugging Face|repo|model)",
        "the model could not be loaded",
        "check model.path; without a network it must be a local folder",
    ),
    _cause(
        r"Address already in use|EADDRINUSE",
        "a network port is taken",
        "look for a leftover Ray or vLLM process of an earlier run",
        fatal=False,  # torch warns so of one address family and goes on with the other
    ),
    _cause(
        r"Engine core initialization failed|EngineCore failed to start|WorkerProc failed to start",
        "the rollout engine did not start",
        "the lines above it in the log say why",
    ),
    _cause(
        r"Worker proc .* died unexpectedly|EngineDeadError|EngineCore encountered a fatal error",
        "a worker of the rollout engine died",
        "the lines above it in the log say why",
    ),
    _cause(
        r"ActorDiedError|ActorUnavailableError|WorkerCrashedError|A worker died or was killed",
        "a Ray worker died",
        "the lines above it in the log say why; `dmesg` tells whether the system killed it for memory",
    ),
)
"""Most specific first."""


def plain(line: str) -> str:
    """A log line without colour codes and trailing white space."""
    return ANSI.sub("", line).rstrip()


def phase_after(line: str) -> str | None:
    """What is being done once `line` was logged, or None if the line does not tell."""
    return next((phase for text, phase in PHASES if text in line), None)


def total_steps(line: str) -> int | None:
    """The number of steps that the run will have, where verl tells it."""
    found = TOTAL_STEPS.search(line)
    return int(found[1]) if found else None


def cause_in(line: str) -> Cause | None:
    """The cause of failure that `line` shows, if any."""
    return next((cause for cause in CAUSES if cause.pattern.search(line)), None)

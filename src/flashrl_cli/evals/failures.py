"""Why an evaluation engine died, from its log, and which option of `flashrl eval` helps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flashrl_cli.errors import RunFailed
from flashrl_cli.runs.tail import last_lines
from flashrl_cli.verl.causes import cause_in
from flashrl_cli.verl.log_lines import telling
from flashrl_cli.verl.tracebacks import root_error

HINTS = {
    "a GPU ran out of memory": "a smaller --max-model-len or --gpu-memory-utilization, or --tp over more GPUs",
    "a GPU has less free memory than the rollout engine asks for": (
        "a smaller --gpu-memory-utilization, or another GPU by CUDA_VISIBLE_DEVICES"
    ),
    "the rollout engine has no memory left for its KV cache": (
        "a smaller --max-model-len, or a larger --gpu-memory-utilization (on a CPU: VLLM_CPU_KVCACHE_SPACE, in GiB)"
    ),
    "prompt and response are longer than the model can take": "a smaller --max-tokens or --max-model-len",
}
"""What helps here, where verl.causes names a key of a training run."""
_READ_LINES = 400
_TAIL_LINES = 15
_WIDTH = 300


def died(code: int, log: Path, *, who: str = "the evaluation engine", hints: Mapping[str, str] = HINTS) -> RunFailed:
    """The error for a process `who` that ended with exit code `code` before its work was done; `hints` by cause."""
    lines = last_lines(log, _READ_LINES)
    cause = next((found for line in lines if (found := cause_in(line)) and found.what in hints), None)
    if cause:
        return RunFailed(f"{who} died: {cause.what}", hint=f"{hints[cause.what]}; its log: {log}")
    what = f"{who} ended with code {code}"
    if root := root_error(lines):
        return RunFailed(f"{what}: {root}", hint=f"its whole log: {log}")
    tail = "\n".join(f"  {line[:_WIDTH]}" for line in telling(lines)[-_TAIL_LINES:])
    return RunFailed(f"{what}:\n{tail}" if tail else what, hint=f"its whole log: {log}")

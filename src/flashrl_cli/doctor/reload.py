"""The reload test: does an engine on this machine take new weights, and answer with them? `reload_engine` measures, this judges.

It is what a run's rollouts rest on: an engine that keeps its old weights, or mixes two policies, trains towards nothing and tells nobody.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashrl_cli import contract
from flashrl_cli.doctor.reload_engine import MEASURED
from flashrl_cli.machine import gpus, software, system
from flashrl_cli.machine.finding import Finding, fail, ok
from flashrl_cli.verl.logs import root_error

ENGINE = "flashrl_cli.doctor.reload_engine"
PRECISIONS = ("bf16", *contract.METHODS)
"""What flashrl refits; fp8-block is verl's own."""
LIMIT_S = 180.0
LARGEST_ERROR = 0.3
"""Share of the change between two policies by which log-probs may miss the new one's.

By fake quantization in PyTorch INT8 takes 0.02 of it and FP8 0.08, oneDNN's INT8 on a CPU without VNNI 0.1 (its 16-bit sums saturate);
one projection that kept its old weights takes 0.54 or more.
"""
TRAINS_WITHOUT = "`flashrl train --rollout bf16` trains without 8 bits"
_ENDING_S = 5.0


def reload_test(precision: str) -> tuple[list[Finding], dict[str, Any] | None]:
    """Findings of the test at `precision`, and what was measured, None where the engine did not get so far."""
    if lack := _lack(precision):
        return [lack], None
    with tempfile.TemporaryDirectory(prefix="flashrl-reload-") as name:
        folder = Path(name)
        reason = _run(precision, folder)
        if reason is not None:
            return [fail("reload engine", reason, TRAINS_WITHOUT if precision != "bf16" else None)], None
        measured: dict[str, Any] = json.loads((folder / MEASURED).read_text(encoding="utf-8"))
    return list(judge(precision, measured)), measured


def _lack(precision: str) -> Finding | None:
    """That this machine has no kernel for a precision, before an engine starts and ends in vLLM's own words; None if it has one."""
    if software.installed_stack(software.probe_versions()) is software.CPU:
        return next(system.cpu_lacks(precision), None)
    reason = gpus.lacks(precision, gpus.seen())
    return fail("rollout.precision", reason, f"--rollout {gpus.PRECISIONS[precision].instead}") if reason else None


def judge(precision: str, measured: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings from what `reload_engine` measured: what the engine holds, reads, makes, and that it comes back to where it was."""
    yield _holds(precision, measured)
    for name, key, what in (
        ("refit", "read_error", "log-probs of given tokens"),
        ("decoding", "made_error", "log-probs of its greedy answers"),
    ):
        yield _answers(name, measured[key], measured["change"], what)
    if measured["returns"]:
        yield ok("return", "the first weights again give the first answers again, to the bit")
    else:
        yield fail("return", "with the first weights again the answers are others: something of the second stayed")


def _holds(precision: str, measured: Mapping[str, Any]) -> Finding:
    shake = contract.Handshake(**measured["holds"])
    layers = f"{shake.quantized_layers} of {shake.linear_layers} linear layers"
    if shake.precision != precision or (precision != "bf16" and shake.quantized_layers < shake.linear_layers):
        return fail(
            "engine", f"{precision} was asked for, the engine holds {shake.precision} in {layers}", TRAINS_WITHOUT
        )
    how = f"{layers} in {precision}, " if precision != "bf16" else ""
    return ok("engine", f"{how}{shake.kernel}, started in {measured['start_s']:.0f} s, refit in {shake.refit_s:.3f} s")


def _answers(name: str, error: float, change: float, what: str) -> Finding:
    figures = f"{what} are {error:.3f} nats from Transformers' in float32; the new weights changed them by {change:.2f}"
    if math.isfinite(error) and error <= LARGEST_ERROR * change:
        return ok(name, figures)
    return fail(name, f"{figures}: the engine does not answer with its new weights", TRAINS_WITHOUT)


def _run(precision: str, folder: Path) -> str | None:
    """Run the engine process to its end; why it gave nothing, or None."""
    log = folder / "log"
    with log.open("wb") as output, _process(precision, folder, output.fileno()) as process:
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"not done within {LIMIT_S:g} s"
    if code == 0 and (folder / MEASURED).is_file():
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"ended with code {code}: {root_error(lines) or (lines[-1:] or ['its log is empty'])[0]}"


@contextlib.contextmanager
def _process(precision: str, folder: Path, log: int) -> Iterator[subprocess.Popen[bytes]]:
    """The engine process; whatever it started is ended with it."""
    process = subprocess.Popen(
        [sys.executable, "-m", ENGINE, precision, str(folder)],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_ENDING_S)


def environment(folder: Path) -> dict[str, str]:
    """One process, offline, with our plugin for vLLM, and nothing of a run's."""
    fixed = {
        contract.ENV_PLUGIN_DIR: str(folder),
        contract.ENV_ROLLOUT: contract.PLAIN.text(),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        # vLLM compiles what counts ranks of log-probs, which takes longer than all the rest (vllm/v1/sample/ops/logprobs.py)
        "TORCHDYNAMO_DISABLE": "1",
    }
    return {"VLLM_LOGGING_LEVEL": "WARNING", **contract.ENGINE, **os.environ, **fixed}

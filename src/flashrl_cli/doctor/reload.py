"""The reload test: whether an engine on this machine takes new weights, and answers with them.

doctor.reload_engine measures, this judges. A run's rollouts rest on it: an engine that keeps its old weights, or mixes
two policies, trains towards nothing unnoticed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashrl_cli import contract
from flashrl_cli.errors import FlashrlError
from flashrl_cli.machine import gpus, software, system
from flashrl_cli.machine.finding import Finding, fail, ok
from flashrl_cli.worker import client

ENGINE = "flashrl_cli.doctor.reload_engine"
LIMIT_S = 180.0
LARGEST_ERROR = 0.3
"""Share of the change between two policies by which log-probs may miss the new one's.

By fake quantization in PyTorch INT8 takes 0.02 of it and FP8 0.08, oneDNN's INT8 on a CPU without VNNI 0.1 (its 16-bit
sums saturate); one projection that kept its old weights takes 0.54 or more.
"""
TRAINS_WITHOUT = "`flashrl train --rollout bf16` trains without 8 bits"


def reload_test(precision: str) -> tuple[list[Finding], dict[str, Any] | None]:
    """Findings of the test at `precision`, and what was measured, None where the engine did not get so far."""
    if lack := _lack(precision):
        return [lack], None
    with tempfile.TemporaryDirectory(prefix="flashrl-reload-") as name:
        try:
            measured = measure(precision, Path(name), environment(Path(name)))
        except FlashrlError as error:
            return [fail("reload engine", error.message, TRAINS_WITHOUT if precision != "bf16" else None)], None
    return list(judge(precision, measured)), measured


def _lack(precision: str) -> Finding | None:
    """The finding that this machine has no kernel for a precision, before an engine starts; None if it has one."""
    if software.installed_stack(software.probe_versions()) is software.CPU:
        return next(system.cpu_lacks(precision), None)
    return next(gpus.gpus_lack(precision, gpus.seen()), None)


def judge(precision: str, measured: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings from what reload_engine measured: what the engine holds, reads and makes, and whether it returns."""
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
    holds = contract.Handshake(**measured["holds"])
    layers = f"{holds.quantized_layers} of {holds.linear_layers} linear layers"
    if holds.precision != precision or (precision != "bf16" and holds.quantized_layers < holds.linear_layers):
        return fail(
            "engine", f"{precision} was asked for, the engine holds {holds.precision} in {layers}", TRAINS_WITHOUT
        )
    how = f"{layers} in {precision}, " if precision != "bf16" else ""
    return ok("engine", f"{how}{holds.kernel}, started in {measured['start_s']:.0f} s, refit in {holds.refit_s:.3f} s")


def _answers(name: str, error: float, change: float, what: str) -> Finding:
    figures = f"{what} are {error:.3f} nats from Transformers' in float32; the new weights changed them by {change:.2f}"
    if math.isfinite(error) and error <= LARGEST_ERROR * change:
        return ok(name, figures)
    return fail(name, f"{figures}: the engine does not answer with its new weights", TRAINS_WITHOUT)


def measure(precision: str, work: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """What the engine process measures. Raises RunFailed if it ends before that, or takes too long."""
    job = {"precision": precision, "work": str(work)}
    with client.worker(ENGINE, job, work, work / "log", env, who="the engine", hints={}) as worker:
        *_, done = worker.ask({}, limit_s=LIMIT_S)
    measured: dict[str, Any] = done["result"]
    return measured


def environment(folder: Path) -> dict[str, str]:
    """One process, offline, with our plugin for vLLM, and nothing of a run's."""
    fixed = {
        contract.ENV_ROLLOUT: contract.PLAIN.text(),
        # vLLM compiles what counts ranks of log-probs (vllm/v1/sample/ops/logprobs.py), and that takes longer than
        # all else
        "TORCHDYNAMO_DISABLE": "1",
    }
    return client.environment(folder, None, client.ONE_PROCESS | fixed)

"""The reload test: whether an engine on this machine takes new weights and generates with them.

doctor.reload_engine measures, and this module judges. A run's rollouts depend on it: an engine that keeps its old
weights, or mixes two policies, would make training useless without any sign.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashrl_cli import contract
from flashrl_cli.doctor.reload_engine import ROTATION
from flashrl_cli.errors import FlashrlError
from flashrl_cli.machine import gpus, software, system
from flashrl_cli.machine.finding import Finding, fail, ok
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.worker import client

ENGINE = "flashrl_cli.doctor.reload_engine"
LIMIT_S = 180.0
LARGEST_ERROR = 0.3
"""Maximum error of log-probs, as a fraction of the change between two policies.

By fake quantization in PyTorch INT8 has an error of 0.02 and FP8 of 0.08; oneDNN's INT8 on a CPU without VNNI has 0.1
(its 16-bit sums saturate). One projection that kept its old weights gives 0.54 or more.
"""
TRAINS_WITHOUT = "`flashrl train --rollout bf16` trains without 8 bits"


def reload_test(precision: str) -> tuple[list[Finding], dict[str, Any] | None]:
    """Findings of the test at `precision`, and the measurements, None if the engine did not get that far."""
    if lack := _lack(precision):
        return [lack], None
    with tempfile.TemporaryDirectory(prefix="flashrl-reload-") as name:
        try:
            measured = measure(precision, Path(name), environment(Path(name)))
        except FlashrlError as error:
            return [fail("reload engine", error.message, TRAINS_WITHOUT if precision != "bf16" else None)], None
    return list(judge(precision, measured)), measured


def _lack(precision: str) -> Finding | None:
    """A failure if this machine has no kernel for a precision, found before an engine starts; None if it has one."""
    if software.installed_stack(software.probe_versions()) is software.CPU:
        return next(system.cpu_lacks(precision), None)
    return next(gpus.gpus_lack(precision, gpus.seen()), None)


def judge(precision: str, measured: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings from the measurements of reload_engine: what the engine holds, its log-probs, and its return to A."""
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
    rotation = ROTATION if PRECISIONS[precision].rotates else 0
    if holds.rotation != rotation:
        what = f"inputs rotated by blocks of {rotation} were asked for, the engine's are {holds.rotation}"
        return fail("engine", what, TRAINS_WITHOUT)
    how = f"{layers} in {precision}, " if precision != "bf16" else ""
    how += f"inputs rotated by blocks of {rotation}, " if rotation else ""
    return ok("engine", f"{how}{holds.kernel}, started in {measured['start_s']:.0f} s, refit in {holds.refit_s:.3f} s")


def _answers(name: str, error: float, change: float, what: str) -> Finding:
    figures = f"{what} are {error:.3f} nats from Transformers' in float32; the new weights changed them by {change:.2f}"
    if math.isfinite(error) and error <= LARGEST_ERROR * change:
        return ok(name, figures)
    return fail(name, f"{figures}: the engine does not answer with its new weights", TRAINS_WITHOUT)


def measure(precision: str, work: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """The measurements of the engine process. Raises RunFailed if it dies or takes too long."""
    job = {"precision": precision, "work": str(work)}
    with client.worker(ENGINE, job, work, work / "log", env, who="the engine", hints={}) as worker:
        *_, done = worker.ask({}, limit_s=LIMIT_S)
    measured: dict[str, Any] = done["result"]
    return measured


def environment(folder: Path) -> dict[str, str]:
    """Environment of the engine: one process, offline, with flashrl's plugin for vLLM, without any run's settings."""
    fixed = {
        contract.ENV_ROLLOUT: contract.PLAIN.text(),
        # vLLM compiles its counting of log-prob ranks (vllm/v1/sample/ops/logprobs.py), which takes longer than
        "TORCHDYNAMO_DISABLE": "1",
    }
    return client.environment(folder, None, client.ONE_PROCESS | fixed)

"""The processes that measure, started with what they are told: an engine for one kind of rollouts, and the scorer."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import contract
from flashrl_cli.bench.job import EngineJob, ScorerJob
from flashrl_cli.evals import failures, process

if TYPE_CHECKING:
    from flashrl_cli.bench.request import Request
    from flashrl_cli.bench.variants import Variant

ENGINE, SCORER = "flashrl_cli.bench.engine", "flashrl_cli.bench.scorer"
HINTS = {
    "a GPU ran out of memory": "a smaller --batch or --gpu-memory-utilization, or --tp over more GPUs",
    "a GPU has less free memory than the rollout engine asks for": (
        "a smaller --gpu-memory-utilization, or another GPU by CUDA_VISIBLE_DEVICES"
    ),
    "the rollout engine has no memory left for its KV cache": (
        "a smaller --prompt or --response, or a larger --gpu-memory-utilization (on a CPU: --kv-memory)"
    ),
}
"""What helps here, by cause (verl.causes)."""


@contextlib.contextmanager
def engine(request: Request, variant: Variant) -> Iterator[process.Worker]:
    """A process whose first order starts the engine of a variant. However the caller leaves, nothing stays running."""
    died = partial(failures.died, who=f"the engine of {variant.name}", hints=HINTS)
    with tempfile.TemporaryDirectory(prefix="flashrl-bench-") as folder:
        work = Path(folder)
        file = work / "job.json"
        _job(request, variant, work).write(file)
        env = process.environment(work, request.devices, _fixed(request, variant), _usual(request))
        with process.worker(ENGINE, file, _log(request, variant.name), env, died) as worker:
            yield worker


@contextlib.contextmanager
def scorer(request: Request) -> Iterator[process.Worker]:
    """A process that holds the model as the trainer computes with it."""
    died = partial(failures.died, who="the scorer", hints=HINTS)
    dtype = request.mismatch.dtype if request.mismatch else "bfloat16"
    with tempfile.TemporaryDirectory(prefix="flashrl-bench-") as folder:
        work = Path(folder)
        file = work / "job.json"
        ScorerJob(model=str(request.model.folder(work)), dtype=dtype).write(file)
        env = process.environment(work, request.devices, {})
        with process.worker(SCORER, file, _log(request, "scorer"), env, died) as worker:
            yield worker


def _log(request: Request, name: str) -> Path:
    """A log with nothing in it yet."""
    log = request.log(name)
    log.unlink(missing_ok=True)
    return log


def _job(request: Request, variant: Variant, work: Path) -> EngineJob:
    questions = None
    if request.mismatch:
        questions = work / "questions.jsonl"
        asked = request.mismatch.questions[: request.mismatch.samples]
        questions.write_text("".join(json.dumps(one.prompt) + "\n" for one in asked), encoding="utf-8")
    weights = request.model.weights
    return EngineJob(
        model=str(request.model.folder(work)),
        weights=weights.plain() if weights else None,
        arguments=variant.arguments(request.model.layers),
        options=request.engine,
        questions=str(questions) if questions else None,
        response=request.response,
        longest=request.longest,
    )


def _fixed(request: Request, variant: Variant) -> dict[str, str]:
    """What the plugins are told, and the size of the KV cache where vLLM takes it from the environment."""
    cache = request.engine.kv_memory
    room = {"VLLM_CPU_KVCACHE_SPACE": str(math.ceil(cache))} if cache and request.machine.kind == "cpu" else {}
    return {contract.ENV_ROLLOUT: variant.options().text(), **room}


def _usual(request: Request) -> dict[str, str]:
    """On a GPU vLLM keeps its scheduler in a process of its own, as in RL; on a CPU that only costs memory and time."""
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if request.machine.kind == "cpu" else {}

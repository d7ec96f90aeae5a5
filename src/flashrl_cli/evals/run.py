"""Evaluate checkpoints: one engine per architecture, responses graded as they come, results and files at the end."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import RunFailed
from flashrl_cli.evals import child
from flashrl_cli.evals.job import Job, Target, read_lines
from flashrl_cli.runs.checkpoints import Checkpoint, Skipped, nothing

if TYPE_CHECKING:
    from flashrl_cli.evals.request import Request

# Keys of config.json that saving a policy again may change, and that responses do not depend on here.
_VOLATILE = frozenset({
    "_name_or_path", "dtype", "torch_dtype", "attn_implementation", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Graded responses of one checkpoint, what the engine held (a contract.Handshake), and the seconds it took."""

    checkpoint: Checkpoint
    responses: list[dict[str, Any]]
    holds: dict[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything evaluated, in the order asked for, and what turned out to be unreadable."""

    evaluated: tuple[Evaluated, ...]
    skipped: tuple[Skipped, ...]
    seconds: float


def evaluate(request: Request, *, say: Callable[[str], None], advance: Callable[[int], None]) -> Outcome:
    """Generate and grade; `say` tells what goes on, `advance` counts finished prompts of all checkpoints together.

    Raises NothingMatched if no checkpoint could be read, RunFailed if an engine died.
    """
    started = time.perf_counter()
    request.folder.mkdir(parents=True, exist_ok=True)
    request.log.unlink(missing_ok=True)
    results: dict[int, Evaluated | Skipped] = {}
    for group in _groups(request.checkpoints):
        with tempfile.TemporaryDirectory(dir=request.folder, prefix=".work-") as work:
            results |= _evaluate_group(request, group, Path(work), say=say, advance=advance)
    ordered = [results[index] for index in sorted(results)]
    evaluated = tuple(r for r in ordered if isinstance(r, Evaluated))
    skipped = tuple(r for r in ordered if isinstance(r, Skipped))
    if not evaluated:
        raise nothing([str(c.source) for c in request.checkpoints], skipped)
    return Outcome(evaluated, skipped, round(time.perf_counter() - started, 2))


def architecture(hf: Path) -> str:
    """What two checkpoints must share to run in one engine: config.json but for what saving it again changes."""
    config = json.loads((hf / "config.json").read_text(encoding="utf-8"))
    return json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True)


def _groups(checkpoints: Sequence[Checkpoint]) -> list[list[int]]:
    """Indices of `checkpoints`, those of one architecture together."""
    groups: dict[str, list[int]] = {}
    for index, checkpoint in enumerate(checkpoints):
        groups.setdefault(architecture(checkpoint.hf), []).append(index)
    return list(groups.values())


def _evaluate_group(
    request: Request, group: list[int], work: Path, *, say: Callable[[str], None], advance: Callable[[int], None]
) -> dict[int, Evaluated | Skipped]:
    job = Job(
        targets=tuple(Target.of(index, request.checkpoints[index]) for index in group),
        work=work,
        sampling=request.sampling,
        rollout=request.rollout,
        max_model_len=request.max_model_len,
    )
    job.questions.write_text("".join(q.line() + "\n" for q in request.questions), encoding="utf-8")
    results: dict[int, Evaluated | Skipped] = {}
    holds: dict[str, Any] = {}
    for event in child.events(job, request.log):
        match event["event"]:
            case "stage":
                say(event["text"])
            case "advance":
                advance(event["prompts"])
            case "loaded":
                holds = event["holds"]
            case "skipped":
                advance(len(request.questions))
                results[event["index"]] = Skipped(request.checkpoints[event["index"]].hf, event["reason"])
            case "done":
                results[event["index"]] = result = _evaluated(request, job, event, holds)
                step = "" if result.checkpoint.step is None else f" step {result.checkpoint.step}"
                say(f"{result.checkpoint.run}{step}: done in {result.seconds:.1f} s")
    if len(results) < len(group):
        raise RunFailed("the evaluation engine ended before its work was done", hint=f"its log: {request.log}")
    return results


def _evaluated(request: Request, job: Job, event: dict[str, Any], holds: dict[str, Any]) -> Evaluated:
    checkpoint = request.checkpoints[event["index"]]
    responses = list(read_lines(job.responses(event["index"])))
    return Evaluated(checkpoint=checkpoint, responses=responses, holds=holds, seconds=event["seconds"])

"""What a person asks to have evaluated, looked up and complete: after it, nothing is guessed.

Which GPUs an evaluation takes: those with the most free memory, so that it does not get in a training run's way.

Whether a smoothing profile can be applied to what is evaluated, found out before an engine starts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.evals import questions
from flashrl_cli.machine import gpus
from flashrl_cli.precision import SMOOTHED
from flashrl_cli.runs.checkpoints import EVAL_FOLDER, Checkpoint, Skipped, find, hf_folder
from flashrl_cli.text import counted
from flashrl_cli.weights import Unreadable, read_json
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    from flashrl_cli.evals.job import EngineSettings, Sampling
    from flashrl_cli.evals.results import DataSet

QUERY = ("--query-gpu=index,memory.total,memory.free", "--format=csv,noheader,nounits")
_USUAL = 0.9
"""vLLM's own gpu_memory_utilization."""
_MARGIN = 0.03
"""Share of the memory that stays free beside the other process and ours."""
_LEAST = 0.1
"""A GPU with less free memory than this share of it is taken."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by its index, with memory in MiB."""

    index: int
    total: int
    free: int

    @property
    def share(self) -> float:
        """Share of its memory that an engine may take."""
        return min(_USUAL, self.free / self.total - _MARGIN)


def choose_devices(engine: EngineSettings) -> tuple[EngineSettings, str | None]:
    """Settings with the memory share that is free, and CUDA_VISIBLE_DEVICES for the engine.

    None where the user chose already or there is no choice. Raises EnvironmentNotReady if too few GPUs have free memory.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return engine, None
    found = parse(gpus.probe(QUERY) or "")
    return freest(engine, found) if found else (engine, None)


def freest(engine: EngineSettings, found: Sequence[Device]) -> tuple[EngineSettings, str]:
    """The choice among `found`. Raises EnvironmentNotReady if too few have free memory."""
    chosen = sorted(found, key=lambda device: (-device.share, device.index))[: engine.tensor_parallel]
    share = min(device.share for device in chosen)
    if len(chosen) < engine.tensor_parallel:
        raise EnvironmentNotReady(f"--tp {engine.tensor_parallel}: this machine has {counted(len(found), 'GPU')}")
    if share < _LEAST:
        free = ", ".join(f"{device.index}: {device.free / 1024:.1f} GiB" for device in found)
        hint = "wait for what runs there (`nvidia-smi` names it), or CUDA_VISIBLE_DEVICES= for a CPU build of vLLM"
        raise EnvironmentNotReady(f"no GPU has room for an engine; free memory by GPU: {free}", hint=hint)
    if engine.gpu_memory_utilization is None:
        engine = dataclasses.replace(engine, gpu_memory_utilization=round(share, 2))
    return engine, ",".join(str(device.index) for device in sorted(chosen, key=lambda device: device.index))


def parse(text: str) -> list[Device]:
    """GPUs in the answer of `nvidia-smi`; lines that describe none are passed over."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    numbers = [list(map(int, row)) for row in rows if len(row) == 3 and all(part.isdigit() for part in row)]
    return [Device(*row) for row in numbers if row[1]]


_WITHOUT = "evaluate it without --profile"


def check(engine: EngineSettings, folders: Iterable[Path]) -> None:
    """Raise InputError unless the engine's profile, if any, is applied to the models in `folders`."""
    if engine.profile is None:
        return
    if engine.rollout not in SMOOTHED:
        raise InputError(
            f"--profile smooths what a quantized rollout loses, and {engine.rollout} loses nothing",
            hint=f"--rollout {SMOOTHED[0]}",
        )
    try:
        profile = Profile.read(Path(engine.profile))
    except Unreadable as error:
        raise InputError(str(error), hint="`flashrl quantize MODEL --calibrate PARQUET` makes one") from None
    for folder in folders:
        try:
            config = read_json(folder / "config.json")
        except Unreadable:
            continue  # it is passed over later, with the reason
        if "quantization_config" in config:
            raise InputError(f"{folder} is quantized already and takes no profile", hint=_WITHOUT)
        if unlike := profile.suits(config):
            raise InputError(f"{engine.profile} is of another model than {folder}: {unlike}", hint=_WITHOUT)


UNITS = "results"
"""Folder of an evaluation in which each checkpoint's graded responses are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Checkpoints (`base` and `baseline` among them, if given), what was passed over, questions and how to answer them.

    `base` is what the runs began with, `baseline` what the best is compared with. `folder` takes the results and the engine's log.
    `fail_under` is the accuracy that is to be reached (verdicts.Threshold).
    """

    patterns: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    base: Checkpoint | None
    baseline: Checkpoint | None
    skipped: tuple[Skipped, ...]
    data: tuple[DataSet, ...]
    sampling: Sampling
    engine: EngineSettings
    folder: Path
    fail_under: float | None = None

    @property
    def log(self) -> Path:
        """All output of the engine."""
        return self.folder / "engine.log"

    @property
    def units(self) -> Path:
        """Where each checkpoint's graded responses are kept."""
        return self.folder / UNITS

    @property
    def prompts(self) -> int:
        """Prompts to answer, over all checkpoints."""
        return len(self.checkpoints) * sum(len(one.questions) for one in self.data)

    def again(self) -> Request:
        """The request with the checkpoints that its patterns name now. Raises NothingMatched if there are none any more."""
        found = find(self.patterns)
        checkpoints = _all(found.checkpoints, self.base, self.baseline)
        return dataclasses.replace(self, checkpoints=checkpoints, skipped=found.skipped)

    def settings(self) -> dict[str, Any]:
        """How it was asked, as plain data."""
        return {"sampling": asdict(self.sampling), "rollout": self.engine.rollout, "profile": self.engine.profile}


def plan(
    patterns: Sequence[str],
    *,
    base: str | None,
    baseline: str | None,
    dataset: str | None,
    limit: int | None,
    sampling: Sampling,
    engine: EngineSettings,
    out: Path | None,
    fail_under: float | None = None,
) -> Request:
    """Look up checkpoints and questions; raises InputError or NothingMatched for what is not there."""
    found = find(patterns)
    start, other = (hf_folder(path) if path else None for path in (base, baseline))
    runs = (c.source for c in found.checkpoints if c.step is not None)
    checkpoints = _all(found.checkpoints, start, other)
    check(engine, [one.hf for one in checkpoints])
    return Request(
        patterns=tuple(patterns),
        checkpoints=checkpoints,
        base=start,
        baseline=other,
        skipped=found.skipped,
        data=questions.choose_questions(dataset, runs, limit),
        sampling=sampling,
        engine=engine,
        folder=paths.absolute(out) if out else _place(found.checkpoints),
        fail_under=fail_under,
    )


def _all(found: Iterable[Checkpoint], base: Checkpoint | None, baseline: Checkpoint | None) -> tuple[Checkpoint, ...]:
    """Base, baseline and what was found, each once."""
    extra = [one for one in (base, baseline) if one]
    return tuple({one.path: one for one in (*extra, *found)}.values())


def _place(checkpoints: Iterable[Checkpoint]) -> Path:
    """`eval/` in the one run, or in the one project of the runs, else in the working folder."""
    sources = {c.source for c in checkpoints if c.step is not None}
    projects = {source.parent for source in sources}
    root = sources.pop() if len(sources) == 1 else projects.pop() if len(projects) == 1 else Path.cwd()
    return root / EVAL_FOLDER

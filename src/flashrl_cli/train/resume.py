"""Where a run continues: from its newest complete step, from the step that was requested, or from the start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.errors import InputError, Problem
from flashrl_cli.paths import absolute
from flashrl_cli.runs import saved
from flashrl_cli.runs.metrics import history
from flashrl_cli.text import counted
from flashrl_cli.verl import checkpoints

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.saved import Saved

MODES = "auto|never|PATH"
WORTH_REDOING_S = 600.0
"""Seconds of training that are worth repeating to get a metrics curve without a gap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """What an attempt continues from, and which superseded steps it moves out of the way first.

    verl would load the step that its tracker names, complete or not, and later steps of an abandoned branch would
    remain among the new ones.
    """

    folder: Path | None = None
    """A `global_step_N` folder; None to start from scratch."""
    superseded: tuple[tuple[Path, str], ...] = ()
    """Superseded steps to be moved out of the way, with the reasons."""
    checkpoints: Path | None = None
    """The run's checkpoints, if it has any."""

    @property
    def step(self) -> int | None:
        """Number of the step that the attempt continues from."""
        return checkpoints.step_number(self.folder.name) if self.folder else None

    def lines(self) -> list[str]:
        """Lines for a terminal: where the run continues, and which steps are superseded."""
        start = [f"going on from step {self.step}: {self.folder}"] if self.folder else []
        return [*start, *(f"setting {path.name} aside: {why}" for path, why in self.superseded)]

    def prepare(self) -> None:
        """Move superseded steps to `.set_aside`, and make verl's tracker name the step to continue from."""
        for path, why in self.superseded:
            saved.set_aside(path, why)
        if self.superseded and self.checkpoints:
            inside = self.folder is not None and self.folder.parent == self.checkpoints
            saved.point_tracker(self.checkpoints, self.step if inside else None)


FROM_NOTHING = Resume()


def choose(spec: RunSpec, run: RunPaths, mode: str) -> Resume:
    """Choose where a run of `spec` continues under `--resume MODE`.

    Raises InputError if the step cannot be loaded: missing, incomplete, or saved by another number of processes.
    """
    if mode == "never":
        return FROM_NOTHING
    critic, loaded = spec.algorithm.advantage == "gae", checkpoints.loaded_by(spec.verl, spec.trainer.mode)
    own = saved.saved_steps(run.checkpoints, critic=critic, loaded=loaded)
    if mode == "auto":
        chosen = _newest(own, run)
    else:
        chosen = saved.inspect(_folder(mode), critic=critic, loaded=loaded)
        if chosen.problems:
            raise InputError(
                f"--resume {mode} cannot be loaded",
                problems=[Problem(problem) for problem in chosen.problems],
                hint="`--resume auto` takes the newest step that is complete",
            )
    if chosen:
        _check_world_size(spec, chosen)
        if loaded.queue:
            _check_storage_units(spec, chosen)
    step = chosen.step if chosen else 0
    later = [one for one in own if one.step > step or (one.problems and one.step == step)]
    return Resume(
        folder=chosen.path if chosen else None,
        superseded=tuple((one.path, _why(one, step, mode)) for one in later),
        checkpoints=run.checkpoints if own else None,
    )


def _folder(mode: str) -> Path:
    path = absolute(mode)
    if not path.is_dir() or checkpoints.step_number(path.name) is None:
        raise InputError(f"--resume {mode}: no folder global_step_N", hint=f"--resume takes {MODES}")
    return path


def _newest(steps: Sequence[Saved], run: RunPaths) -> Saved | None:
    """The newest complete step, or the one before if only the newest's metrics are missing and few steps are between.

    verl saves a step before it validates and logs it (trainer/ppo/v1/trainer_base.py:480-515).
    """
    complete = [one for one in steps if one.complete]
    if not complete:
        return None
    newest = complete[-1]
    logged = {metrics.step: metrics["step_s"] for metrics in history(run) if metrics.trained}
    if not logged or newest.step in logged:
        return newest
    before = [one for one in complete if one.step in logged]
    paces = [seconds for seconds in logged.values() if seconds]
    repeated = newest.step - (before[-1].step if before else 0)
    if paces and repeated * sum(paces) / len(paces) <= WORTH_REDOING_S:
        return before[-1] if before else None
    return newest


def _why(one: Saved, step: int, mode: str) -> str:
    if one.problems:
        return f"incomplete: {'; '.join(one.problems)}"
    reason = "its metrics were not written" if mode == "auto" else f"--resume {mode}"
    return f"{reason}: the run goes on from step {step}"


def _check_world_size(spec: RunSpec, chosen: Saved) -> None:
    """Raise InputError if the step was saved by a number of processes that differs from the run's.

    Each process loads the shards of its own rank and world size; otherwise it would fail in a worker minutes after the
    start (verl/utils/checkpoint/fsdp_checkpoint_manager.py:213).
    """
    nodes, world = spec.resources.nodes, spec.resources.devices
    saved_by = chosen.world_size
    if saved_by is None or saved_by == world:
        return
    divides = saved_by % nodes == 0
    fix = f"--set resources.gpus_per_node={saved_by // nodes}" if divides else "the resources it was saved with"
    raise InputError(
        f"{chosen.path} was saved by {saved_by} trainer processes, this run has {world}",
        hint=f"{fix}, or another step: --resume PATH",
    )


def _check_storage_units(spec: RunSpec, chosen: Saved) -> None:
    """Raise InputError if the step's transfer queue has another number of storage units than the run.

    Each unit loads the file of its own number (transfer_queue/storage/managers/simple_storage_manager.py:841).
    """
    found, units = checkpoints.saved_units(chosen.path), checkpoints.storage_units(spec.verl)
    if found not in (None, units):
        raise InputError(
            f"{chosen.path} has a transfer queue of {counted(found, 'storage unit')}, this run has {units}",
            hint=f"--set verl.{checkpoints.STORAGE_UNITS}={found}, or another step: --resume PATH",
        )

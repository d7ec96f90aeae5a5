"""Locations of prepared data, runs, checkpoints and presets.

Every path is absolute, because Ray starts workers in other working folders.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flashrl_cli.errors import InputError

FOLDER_NAME = r"^[^/.\x00-\x1f][^/\x00-\x1f]{0,199}$"
"""Valid names of presets, projects and runs: one visible folder."""


def absolute(path: str | Path) -> Path:
    """Expand `~` and make the path absolute, without following links, whose names the user chose.

    The path is unchanged if it begins with a `~user` who does not exist. Raises InputError if the working folder was
    deleted.
    """
    try:
        return Path(os.path.abspath(os.path.expanduser(path)))  # noqa: PTH111  # pathlib's raises
    except FileNotFoundError:
        raise InputError("the working folder does not exist any more", hint="change to another folder") from None


def existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def data_root() -> Path:
    """Folder of prepared data: `$FLASHRL_DATA`, else `~/data`."""
    return absolute(os.environ.get("FLASHRL_DATA") or "~/data")


def runs_root() -> Path:
    """Folder of run records: `$FLASHRL_RUNS`, else `./runs`."""
    return absolute(os.environ.get("FLASHRL_RUNS") or "runs")


def checkpoints_root() -> Path:
    """Folder of checkpoints: `$FLASHRL_CHECKPOINTS`, else `./checkpoints`."""
    return absolute(os.environ.get("FLASHRL_CHECKPOINTS") or "checkpoints")


def presets_root() -> Path:
    """Folder of the shipped presets: in the wheel, or in the repository for an editable install."""
    packaged = Path(__file__).parent / "_presets"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "presets"


def checkout() -> Path | None:
    """Folder of flashrl's repository in an editable install; None for a wheel."""
    root = presets_root().parent
    return root if (root / "pyproject.toml").is_file() else None


@dataclass(frozen=True, slots=True)
class DatasetPaths:
    """Files of one prepared data set, in the folder `root`."""

    name: str
    root: Path

    @classmethod
    def named(cls, name: str) -> DatasetPaths:
        """The data set `name` in its default folder below the data root."""
        return cls(name=name, root=data_root() / name)

    def split(self, split: str) -> Path:
        """Parquet file of a split (`train` or `test`)."""
        return self.root / f"{split}.parquet"

    @property
    def manifest(self) -> Path:
        """Manifest: the sources, their hashes, and what was prepared from them."""
        return self.root / "manifest.json"

    @property
    def model(self) -> Path:
        """HF folder of the policy that belongs to the data set (only `tiny` has one)."""
        return self.root / "model"


@dataclass(frozen=True, slots=True)
class AttemptPaths:
    """Files of one attempt of a run; an attempt never overwrites an earlier one."""

    root: Path

    @property
    def log(self) -> Path:
        """All output of the trainer, of Ray and of every worker."""
        return self.root / "driver.log"

    @property
    def metrics(self) -> Path:
        """verl's metrics, one JSON object per step."""
        return self.root / "metrics.jsonl"

    @property
    def plugins(self) -> Path:
        """Handshake files that the rollout workers write."""
        return self.root / "plugins"

    @property
    def log_ratios(self) -> Path:
        """A sample of each step's log-ratios between trainer and rollout (`plugins.log_ratios`)."""
        return self.root / "log_ratios"

    @property
    def reward(self) -> Path:
        """Copy of the file with the user's reward function, which the run calls."""
        return self.root / "reward.py"

    @property
    def reward_failure(self) -> Path:
        """Why the user's reward function gave no reward, if that ended the attempt (`plugins.reward`)."""
        return self.root / "reward_failure.json"

    @property
    def plan(self) -> Path:
        """The launch plan that was executed."""
        return self.root / "plan.json"


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Files of one run: `runs/<name>/attempt_N` and `checkpoints/<project>/<name>`."""

    name: str
    root: Path
    checkpoints: Path

    @property
    def record(self) -> Path:
        """Record of the run and its attempts (`runs.store`)."""
        return self.root / "run.json"

    def attempt(self, number: int) -> AttemptPaths:
        """Files of attempt `number` (from 1)."""
        return AttemptPaths(self.root / f"attempt_{number}")

    def attempts(self) -> list[int]:
        """Numbers of the attempts on disk, in order."""
        found = (p.name.removeprefix("attempt_") for p in self.root.glob("attempt_*"))
        return sorted(int(n) for n in found if n.isdigit())


def prepared_model(reference: str, root: Path | None = None) -> Path | None:
    """Folder of the model `prepared:NAME` below the data root (or `root`, if given); None for another reference."""
    name = reference.removeprefix("prepared:")
    if name == reference:
        return None
    return DatasetPaths(name, (root or data_root()) / name).model

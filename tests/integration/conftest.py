"""What the tests on the real stack share: one prepared tiny policy, a place for runs, and how to call flashrl."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from tests.integration.ray_cluster import free_port

BY_VERL = Path(__file__).with_name("checkpoints_by_verl.py")
STEPS = (2, 4, 10)
WORLDS = (1, 2)
SMALL = (
    *("--set", "data.train_batch_size=16", "--set", "rollout.n=4"),
    *("--set", "algorithm.micro_batch_size_per_gpu=32", "--set", "rollout.log_prob_micro_batch_size_per_gpu=32"),
)
"""A quarter of the tiny preset's responses a step, for a run that is about something else than what it learns."""
PATIENCE_S = 1380
"""Runs share two cores, which may have other work: only what stands still takes so long.

Less than pytest's own limit, which tells less.
"""
ENDING_S = 60.0
"""A helper of Python's own (its fork server, its resource tracker) ends soon after the command that it served."""


FIRST = (
    "corrections", "trainer_step", "train", "reload", "kv_scales", "smoothing", "online_linear", "ray", "kill_resume",
    "survival", "eval", "refit", "bench", "support", "own_data",
)  # fmt: skip
"""Files in the order in which two processes take them: what needs no workshop while the first one prepares it, then the
longest.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}.py" for name in FIRST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


@dataclass(frozen=True)
class Workshop:
    """A folder with prepared data, in which runs are made."""

    root: Path

    @property
    def env(self) -> dict[str, str]:
        """Environment of a user who works in this folder."""
        places = {f"FLASHRL_{name.upper()}": str(self.root / name) for name in ("data", "runs", "checkpoints")}
        return {**os.environ, **places, "CI": "1"}

    def start(self, *args: object, **env: str) -> subprocess.Popen[str]:
        """`flashrl …` with both outputs piped."""
        command = [sys.executable, "-m", "flashrl_cli", *map(str, args)]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: object, code: int = 0, **env: str) -> tuple[str, str]:
        """Outputs of `flashrl …`, which must end with `code`."""
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == code, f"exit {process.returncode}\n{out[-3000:]}\n{err[-6000:]}"
        return out, err

    def leftovers(self) -> list[str]:
        """Processes that belong to runs of this folder and do not end of themselves within a moment."""
        deadline = time.monotonic() + ENDING_S
        while (found := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _processes(self) -> list[str]:
        """Processes of this folder, by working folder or command line."""
        found = []
        for process in psutil.process_iter(["cwd", "cmdline"]):
            info = process.info
            if str(self.root) in f"{info['cwd']} {' '.join(info['cmdline'] or ())}":
                found.append(f"{process.pid} {info['cmdline']}")
        return found


def more_than_guessed(right: float, trials: int) -> bool:
    """Whether so many right answers tell a policy that knows sums from one that guesses: a bound of the sample size
    alone.

    A guess is right once in 100 times at most: so frequent is the most frequent sum of two numbers below 100, which is
    99. One in 1,000 guessing policies passes.
    """
    by_chance = sum(math.comb(trials, k) * 0.01**k * 0.99 ** (trials - k) for k in range(round(right), trials + 1))
    return by_chance < 1e-3


def events(text: str, kind: str) -> list[dict[str, Any]]:
    """Events of one kind out of the JSON lines of `train --json`."""
    return [event for event in map(json.loads, text.splitlines()) if event["event"] == kind]


def of_all_workers(factory: pytest.TempPathFactory) -> Path:
    """The folder of this test session that the processes of pytest-xdist share."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder` as `make` leaves it, by whichever process comes first; the others wait for it."""
    done = folder.with_suffix(".done")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A folder with the result of `flashrl prepare tiny`, of this process alone: its runs are told by their folder."""

    def prepare(folder: Path) -> None:
        Workshop(folder).run("prepare", "tiny")

    prepared = made_once(of_all_workers(tmp_path_factory) / "prepared", prepare)
    shop = Workshop(tmp_path_factory.mktemp("workshop"))
    shutil.copytree(prepared / "data", shop.root / "data")
    yield shop
    assert not shop.leftovers()


def start_ranks(out: Path, policy: Path, world_size: int) -> list[subprocess.Popen[bytes]]:
    out.mkdir()
    host = "127.0.0.1"
    env = {**os.environ, "MASTER_ADDR": host, "MASTER_PORT": str(free_port(host)), "WORLD_SIZE": str(world_size)}
    argv = [sys.executable, str(BY_VERL), "make", str(out), str(policy), *map(str, STEPS)]
    return [
        subprocess.Popen(argv, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(world_size)
    ]


def save_by_verl(root: Path, policy: Path) -> None:
    ranks = {world_size: start_ranks(root / f"w{world_size}", policy, world_size) for world_size in WORLDS}
    for process in (p for processes in ranks.values() for p in processes):
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors.decode()[-2000:]


@pytest.fixture(scope="session")
def saved(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders `model` (the tiny policy) and `run` of a world of one and of two ranks; they are read, never changed."""
    policy = workshop.root / "data" / "tiny" / "model"
    root = made_once(of_all_workers(tmp_path_factory) / "saved", lambda folder: save_by_verl(folder, policy))
    return {world_size: root / f"w{world_size}" for world_size in WORLDS}

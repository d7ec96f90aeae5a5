"""Runs on disk, as attempts leave them: with and without records, in the folders that the environment names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flashrl_cli import contract, files, paths
from flashrl_cli.contract import Handshake
from flashrl_cli.paths import RunPaths
from flashrl_cli.plugins import log_ratios
from flashrl_cli.plugins.log_ratios import Sample
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt, RunRecord
from flashrl_cli.train.plan import build_plan, plan_document
from flashrl_cli.verl.metrics import DROPPED, NAMES, TIMINGS
from tests.specs import load_spec

Logged = Mapping[str, float | None]

THEN = "2026-03-01T10:00:00+00:00"
LATER = "2026-03-01T11:30:00+00:00"
GONE: dict[str, Any] = {"pid": 4_000_000, "pid_started": 1.0}
"""A process that does not exist (above Linux's largest pid)."""
REWARD: Logged = {"critic/score/mean": 0.5}


def place(name: str = "r") -> RunPaths:
    """Where a run of that name is; nothing is made."""
    return RunPaths(name, paths.runs_root() / name, paths.checkpoints_root() / "tiny" / name)


def a_run(name: str = "r") -> RunPaths:
    """A run that has a folder and nothing in it."""
    run = place(name)
    run.root.mkdir(parents=True)
    return run


def make(name: str, *attempts: Attempt, checkpoints: int = 0) -> RunPaths:
    """Run `name` with a record of `attempts` (none without), their folders, and a checkpoint of so many bytes."""
    run = place(name)
    for number in [one.number for one in attempts] or [1]:
        run.attempt(number).root.mkdir(parents=True)
    if attempts:
        write_record(run, attempts)
    if checkpoints:
        file = run.checkpoints / "global_step_1" / "actor" / "model.pt"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x" * checkpoints)
    return run


def attempt(number: int = 1, **fields: Any) -> Attempt:
    """An attempt of this process that is done, unless `fields` say otherwise."""
    given = {"status": "done", "started": THEN, "updated": LATER, **store.own_process(), **fields}
    return Attempt(number=number, **given)


def write_record(run: RunPaths, attempts: Iterable[Attempt], **fields: Any) -> RunRecord:
    """Write the run's record."""
    given = {"project": "tiny", "preset": "demo", "created": THEN, "checkpoints": str(run.checkpoints), **fields}
    whole = RunRecord(name=run.name, attempts=tuple(attempts), **given)
    return store.change(run, lambda _: whole)


def training(reward: float | None = 0.5, **more: float | None) -> Logged:
    """What a training step logs: every metric that flashrl names, and `more` of them; underscored phases are
    `seconds_actor`.
    """
    named = dict.fromkeys(NAMES, 1.0) | dict.fromkeys(DROPPED, 0.0) | {"reward": reward, "step_s": 10.0}
    seconds = {"generate": 4.0, "actor": 3.0}
    for name, value in more.items():
        if name.startswith("seconds_"):
            seconds[name.removeprefix("seconds_")] = value or 0.0
        else:
            named[name] = value
    return {NAMES[name]: value for name, value in named.items()} | {TIMINGS[p]: s for p, s in seconds.items()}


def by_staleness(kls: Mapping[Any, float], tokens: float = 1000, **more: float) -> Logged:
    """What an asynchronous step logs beside of the tokens of each staleness: these KLs, and as many tokens of each."""
    numbered = sum(number != "fresh" for number in kls)
    return {
        f"{contract.STALENESS}{number}/{name}": value
        for number, kl in kls.items()
        for name, value in {
            "tokens": tokens,
            "share": 1 / numbered,
            "kl": kl,
            "kl_k3": kl,
            "weight_mean": 1 - kl / 10,
            "effective": 1 / (1 + kl),
            "truncated": kl / 2,
            "prob_diff": kl,
            "prob_correlation": 1 - kl / 10,
            **more,
        }.items()
        if number != "fresh" or name != "share"
    }


def validation(accuracy: float | None) -> Logged:
    """What a validation logs."""
    return {"val-core/tiny/acc/mean@1": accuracy}


def log(run: RunPaths, number: int, steps: Mapping[int, Logged]) -> None:
    """Append steps to the metrics of attempt `number`."""
    file = run.attempt(number).metrics
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.writelines(json.dumps({"step": step, "data": data}) + "\n" for step, data in steps.items())


def planned(run: RunPaths, number: int, **spec: Any) -> None:
    """The least plan of attempt `number`, with these parts of the preset."""
    plan = {
        "schema_version": 1,
        "preset": "older",
        "overrides": [],
        "env": {},
        "files": {"checkpoints": str(run.checkpoints)},
        "spec": spec,
    }
    files.write_json(run.attempt(number).plan, plan)


def plan(run: RunPaths, number: int, *sets: str) -> dict[str, Any]:
    """Write attempt `number`'s plan of the preset tiny."""
    built = build_plan(
        load_spec("tiny", rollout="int8", tis="2", sets=sets),
        name=run.name,
        attempt=number,
        python=sys.executable,
        runs_root=paths.runs_root(),
        checkpoints_root=paths.checkpoints_root(),
        data_root=paths.data_root(),
    )
    document = plan_document(built)
    files.write_json(run.attempt(number).plan, document)
    return document


def handshake(precision: str = "int8", **fields: Any) -> Handshake:
    """What a rollout worker reports of itself."""
    given: dict[str, Any] = {
        "host": "h",
        "pid": 1,
        "quantized_layers": 14,
        "linear_layers": 15,
        "quantized_bytes": 9,
        "kernel": "Int8Kernel",
        "vllm": "0",
        "torch": "2",
        "device": "cpu",
        "refits": 1,
        "refit_s": 0.123,
        **fields,
    }
    return Handshake(precision=precision, **given)


def kept(run: RunPaths, number: int, *steps: int, mismatch: float = 0.1, stale: bool = False) -> None:
    """What attempt `number` kept of these steps: 40 responses of 60 tokens, with log-ratios of about `mismatch`.

    Of `stale` responses the first half of the tokens is of staleness 1 and has twice such log-ratios, and each fourth
    response of staleness 0.
    """
    for step in steps:
        make = np.random.default_rng(step)
        aged = np.tile(np.repeat([0, 1, 1, 1], 60) * (np.arange(240) % 60 < 30), 10)
        drawn = make.normal(-(mismatch**2) / 2, mismatch, 2400)
        sample = Sample(
            step=step,
            responses=80,
            log_ratios=(drawn * (1 + aged) if stale else drawn).astype(np.float16),
            lengths=np.full(40, 60, np.int32),
            advantages=make.choice([-1.0, 1.0], 40).astype(np.float32),
            staleness=aged.astype(np.int16) if stale else None,
        )
        log_ratios.write(run.attempt(number).log_ratios, sample)


def touch(run: RunPaths, moment: float) -> None:
    """Date everything in the run's folder."""
    for path in (*run.root.rglob("*"), run.root):
        os.utime(path, (moment, moment))

"""When a run is ended, by a clock that the test moves: no process at all. (test_supervise.py runs real ones.)"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from flashrl_cli.contract import Handshake, write_handshake
from flashrl_cli.errors import EnvironmentNotReady, RunFailed
from flashrl_cli.train import handshake, supervise
from flashrl_cli.train.plan import LaunchPlan
from flashrl_cli.train.process import Tree


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class NoTree:
    """Nothing that runs."""

    def tend(self) -> None:
        return None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(supervise, "time", found)
    return found


def watching(plan: LaunchPlan, seen: Any) -> supervise.Watch:
    plan.attempt_paths.plugins.mkdir(parents=True, exist_ok=True)
    return supervise.Watch(plan, seen, cast("Tree", NoTree()), None)


def add(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"{text}\n")


def int8_shake() -> Handshake:
    return Handshake(
        host="h",
        pid=1,
        precision="int8",
        quantized_layers=14,
        linear_layers=15,
        quantized_bytes=9,
        kernel="K",
        vllm="0",
        torch="2",
        device="cpu",
        refits=1,
        refit_s=0.1,
    )


def line(step: int) -> str:
    return json.dumps({"step": step, "data": {}})


def test_each_phase_of_a_start_gets_the_whole_time(
    tiny_plan: Callable[..., LaunchPlan], seen: Any, clock: Clock
) -> None:
    plan = tiny_plan(start_timeout_s=10)
    watch = watching(plan, seen)
    for text in ("Started a local Ray instance", "create worker group", "all initialize finished, ready to fit"):
        clock.now += 9
        add(plan.attempt_paths.log, text)
        watch.look()
    add(plan.attempt_paths.log, "no phase at all")
    clock.now += 11
    with pytest.raises(RunFailed, match="no progress for 10 s during the start"):
        watch.look()


def test_validation_before_training_is_progress_but_no_step(
    tiny_plan: Callable[..., LaunchPlan], seen: Any, clock: Clock
) -> None:
    plan = tiny_plan(start_timeout_s=10, step_timeout_s=1)
    watch = watching(plan, seen)
    clock.now += 9
    add(plan.attempt_paths.metrics, line(0))
    watch.look()
    clock.now += 9
    watch.look()
    assert (watch.steps, seen.steps) == (0, [0])


def test_each_step_gets_the_whole_time(tiny_plan: Callable[..., LaunchPlan], seen: Any, clock: Clock) -> None:
    plan = tiny_plan(step_timeout_s=10)
    write_handshake(plan.attempt_paths.plugins, int8_shake())
    watch = watching(plan, seen)
    for step in (11, 12, 13):
        clock.now += 9
        add(plan.attempt_paths.metrics, line(step))
        watch.look()
    assert watch.steps == 3, "steps of this attempt, not the run's number"
    clock.now += 11
    add(plan.attempt_paths.log, "create worker group")  # says nothing after the first step
    with pytest.raises(RunFailed, match="during a step"):
        watch.look()
    assert seen.phases == []


def test_verl_has_its_grace_after_a_fatal_line_and_the_first_cause_counts(
    tiny_plan: Callable[..., LaunchPlan], seen: Any, clock: Clock
) -> None:
    plan = tiny_plan(failure_grace_s=10)
    watch = watching(plan, seen)
    add(plan.attempt_paths.log, "OSError: [Errno 28] No space left on device")
    watch.look()
    clock.now += 9
    add(plan.attempt_paths.log, "ray.exceptions.ActorDiedError: gone")
    watch.look()
    clock.now += 2
    with pytest.raises(RunFailed, match="a disk is full"):
        watch.look()


def test_every_worker_must_prove_itself(tiny_plan: Callable[..., LaunchPlan], seen: Any) -> None:
    plan = tiny_plan("resources.gpus_per_node=2")
    watch = watching(plan, seen)
    write_handshake(plan.attempt_paths.plugins, int8_shake())
    watch.look()
    assert seen.proofs == []
    add(plan.attempt_paths.metrics, line(1))
    with pytest.raises(EnvironmentNotReady, match="1 of 2 workers proved theirs"):
        watch.look()


def test_proof_that_arrives_with_the_first_step_counts(
    tiny_plan: Callable[..., LaunchPlan], seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last handshake may be written between the look at the proofs and the look at the metrics."""
    plan = tiny_plan()
    watch = watching(plan, seen)
    add(plan.attempt_paths.metrics, line(1))
    looks: Iterator[list[Handshake]] = iter([[]])
    monkeypatch.setattr(handshake, "read", lambda _: next(looks, [int8_shake()]))
    watch.look()
    watch.look()
    assert seen.steps == [1]
    assert len(seen.proofs) == 1

"""What tests of a launch share: a plan with short clocks, and a display that keeps what it is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.contract import Handshake
from flashrl_cli.train.plan import LaunchPlan, build_plan
from flashrl_cli.verl.metrics import StepMetrics

LIMITS = {"start_timeout_s": 60, "step_timeout_s": 60, "failure_grace_s": 60, "stop_grace_s": 5}


class Recorder:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.proofs: list[list[Handshake]] = []
        self.steps: list[int] = []
        self.total: int | None = None
        self.ticks = 0

    def expect(self, total: int) -> None:
        self.total = total

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def proven(self, shakes: list[Handshake]) -> None:
        self.proofs.append(shakes)

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics.step)

    def tick(self) -> None:
        self.ticks += 1


@pytest.fixture
def seen() -> Recorder:
    return Recorder()


@pytest.fixture
def tiny_plan(tmp_path: Path) -> Callable[..., LaunchPlan]:
    """`tiny_plan("key=value", stop_grace_s=1)`: the preset tiny in `tmp_path`, with the given clocks of `watch`."""

    def build(*sets: str, **watch: float) -> LaunchPlan:
        clocks = [f"watch.{key}={value}" for key, value in (LIMITS | watch).items()]
        return build_plan(
            load_spec("tiny", sets=[*sets, *clocks]),
            name="r",
            attempt=1,
            python=sys.executable,
            runs_root=tmp_path / "runs",
            checkpoints_root=tmp_path / "checkpoints",
            data_root=tmp_path / "data",
        )

    return build

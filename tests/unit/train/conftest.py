"""What tests of training share: a display that records, and plans with short clocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashrl_cli.train.plan import LaunchPlan
from tests.unit.train.builders import Recorder, planned

LIMITS = {"start_timeout_s": 60, "step_timeout_s": 60, "failure_grace_s": 60, "stop_grace_s": 5}


@pytest.fixture
def seen() -> Recorder:
    return Recorder()


@pytest.fixture
def tiny_plan(tmp_path: Path) -> Callable[..., LaunchPlan]:
    """`tiny_plan("key=value", stop_grace_s=1)`: the preset tiny in `tmp_path`, with the given clocks of `watch`."""

    def build(*sets: str, **watch: float) -> LaunchPlan:
        clocks = [f"watch.{key}={value}" for key, value in (LIMITS | watch).items()]
        return planned("tiny", *sets, *clocks, root=tmp_path)

    return build

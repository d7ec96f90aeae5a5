"""What log lines mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.verl.causes import cause_in
from flashrl_cli.verl.logs import StartPhase, phase_after, plain, telling, total_steps


def test_plain() -> None:
    assert plain("\x1b[36m(TaskRunner pid=7)\x1b[0m hello \t\n") == "(TaskRunner pid=7) hello"


@pytest.mark.parametrize("phase", StartPhase)
def test_phases(phase: StartPhase) -> None:
    for text in phase.texts:
        assert phase_after(f"(TaskRunner pid=7) {text} …", StartPhase.VERL) is phase


@pytest.mark.parametrize("name", ["healthy", "resumed", "two_nodes"])
def test_a_start_goes_through_every_phase_in_order(name: str) -> None:
    log = (Path(__file__).parent / "logs" / f"{name}.log").read_text(encoding="utf-8")
    seen = [StartPhase.VERL]
    for line in log.splitlines():
        phase = phase_after(plain(line), seen[-1])
        seen += [phase] if phase else []
    assert seen == list(StartPhase)


def test_a_phase_does_not_come_back() -> None:
    line = "(TaskRunner pid=7) create worker group dict_keys(['actor_rollout'])"
    assert phase_after(line, StartPhase.WORKERS) is StartPhase.POLICY
    assert phase_after(line, StartPhase.POLICY) is None
    assert phase_after(line, StartPhase.SAMPLING) is None


@pytest.mark.parametrize(
    ("line", "steps"), [("(TaskRunner pid=7) Total training steps: 20", 20), ("Total training steps: ?", None)]
)
def test_total_steps(line: str, steps: int | None) -> None:
    assert total_steps(line) == steps


@pytest.mark.parametrize("line", ["", "step:1 - actor/grad_norm:0.5", "Memory usage: 12 GiB", "loading the model"])
def test_ordinary_lines_mean_nothing(line: str) -> None:
    assert cause_in(line) is None
    assert phase_after(line, StartPhase.VERL) is None
    assert total_steps(line) is None


def test_every_phase_of_a_start_has_a_clock_but_the_first_step_s() -> None:
    assert [phase for phase in StartPhase if phase.clock_s is None] == [StartPhase.SAMPLING]


def test_what_is_said_in_every_start_is_left_out_of_a_tail() -> None:
    said = [
        (
            "\x1b[36m(WorkerDict pid=1)\x1b[0m /v/verl/workers/engine/__init__.py:32: UserWarning: torchtitan engine is not available: "
            "ModuleNotFoundError(\"No module named 'torchtitan'\")"
        ),
        '\x1b[36m(WorkerDict pid=1)\x1b[0m   warnings.warn(f"torchtitan engine is not available: {e!r}", stacklevel=1)',
        "",
        "\x1b[31mValueError: it broke\x1b[0m",
    ]
    assert telling(said) == ["ValueError: it broke"]

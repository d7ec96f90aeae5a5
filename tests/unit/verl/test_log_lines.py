"""What log lines mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.verl.log_lines import PHASES, cause_in, phase_after, plain, total_steps


def test_plain() -> None:
    assert plain("\x1b[36m(TaskRunner pid=7)\x1b[0m hello \t\n") == "(TaskRunner pid=7) hello"


@pytest.mark.parametrize(("text", "phase"), PHASES)
def test_phases(text: str, phase: str) -> None:
    assert phase_after(f"(TaskRunner pid=7) {text} …") == phase


@pytest.mark.parametrize("name", ["healthy", "resumed"])
def test_a_start_goes_through_every_phase_in_order(name: str) -> None:
    log = (Path(__file__).parent / "logs" / f"{name}.log").read_text(encoding="utf-8")
    seen = [phase for line in log.splitlines() if (phase := phase_after(plain(line)))]
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys(phase for _, phase in PHASES))
    assert seen == sorted(seen, key=[phase for _, phase in PHASES].index)


@pytest.mark.parametrize(
    ("line", "steps"), [("(TaskRunner pid=7) Total training steps: 20", 20), ("Total training steps: ?", None)]
)
def test_total_steps(line: str, steps: int | None) -> None:
    assert total_steps(line) == steps


@pytest.mark.parametrize("line", ["", "step:1 - actor/grad_norm:0.5", "Memory usage: 12 GiB", "loading the model"])
def test_ordinary_lines_mean_nothing(line: str) -> None:
    assert cause_in(line) is None
    assert phase_after(line) is None
    assert total_steps(line) is None

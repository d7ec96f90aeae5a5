"""Which cause a log shows. The logs were recorded from failures provoked on verl 0.9.1, Ray 2.60 and vLLM; GPU texts name their source."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.verl.causes import CAUSES, Cause, cause_in
from flashrl_cli.verl.log_lines import plain

LOGS = Path(__file__).parent / "logs"
HEALTHY = ("healthy", "resumed", "interrupted")
SHOWN = {
    "gpu_busy": "a GPU is taken by another process",
    "gpu_driver": "the NVIDIA driver is too old for this torch",
    "gpu_failed": "a GPU failed",
    "gpu_kernel": "a GPU kernel went wrong",
    "gpu_memory": "a GPU ran out of memory",
    "gpu_memory_accelerator": "a GPU ran out of memory",
    "gpu_missing": "a process was given a GPU that is not there",
    "gpu_occupied": "a GPU has less free memory than the rollout engine asks for",
    "gpu_twice": "a process was given a GPU that is not there",
    "gpu_unknown": "torch or vLLM was not built for this kind of GPU",
    "nccl_error": "the GPUs could not talk to each other (NCCL)",
    "nccl_timeout": "the GPUs waited in vain for one of them",
    "package_missing": "a Python package is missing",
    "setting_refused": "verl refuses a setting",
    "setting_unknown": "verl refuses a setting",
}


def lines_of(name: str) -> list[str]:
    return (LOGS / f"{name}.log").read_text(encoding="utf-8").splitlines()


def causes_in(name: str) -> list[Cause]:
    return [cause for line in lines_of(name) if (cause := cause_in(plain(line)))]


@pytest.mark.parametrize(("name", "what"), SHOWN.items(), ids=SHOWN)
def test_the_most_specific_cause_of_a_log(name: str, what: str) -> None:
    assert min(causes_in(name), key=CAUSES.index).what == what


def test_every_log_is_tested() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == {*SHOWN, *HEALTHY}


@pytest.mark.parametrize("name", [*SHOWN, *HEALTHY])
def test_logs_are_short_and_of_no_machine(name: str) -> None:
    text = "\n".join(lines_of(name))
    assert len(lines_of(name)) <= (200 if name in HEALTHY else 60)
    assert "\x1b" not in text
    assert "/work/" not in text
    assert "/root/" not in text


@pytest.mark.parametrize("name", HEALTHY)
def test_a_run_that_goes_well_shows_no_cause(name: str) -> None:
    assert causes_in(name) == []


def test_every_cause_tells_what_happened_and_what_to_do() -> None:
    assert len({cause.what for cause in CAUSES}) == len(CAUSES)
    assert all(cause.what and cause.hint for cause in CAUSES)
    assert not [cause.what for cause in CAUSES if "\n" in cause.what + cause.hint or cause.what.endswith(".")]

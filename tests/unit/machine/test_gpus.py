"""What `nvidia-smi` says, read, and what these GPUs can compute."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.machine import gpus
from flashrl_cli.machine.gpus import FreeMemory, Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "580.65.06", 81559)
A100 = Gpu("NVIDIA A100-SXM4-40GB", (8, 0), "570.124.06", 40960)
T4 = Gpu("Tesla T4", (7, 5), "550.54.15", 15360)
V100 = Gpu("Tesla V100-SXM2-16GB", (7, 0), "550.54.15", 16384)
B200 = Gpu("NVIDIA B200", (10, 0), "580.65.06", 183359)
L4 = Gpu("NVIDIA L4", (8, 9), "580.65.06", 23034)


def test_parse() -> None:
    text = "NVIDIA H100 80GB HBM3, 9.0, 580.65.06, 81559\nTesla T4, 7.5, 550.54.15, 15360\n"
    assert gpus.parse(text) == [H100, T4]
    messages = (
        "No devices were found",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
    )
    unknown = ("NVIDIA X, [N/A], 580.65.06, 81559", "NVIDIA X, 9.0, 580.65.06, [N/A]")
    for line in (None, "", *messages, 'Field "compute_cap" is not a valid field to query.', *unknown):
        assert gpus.parse(line) == [], line


@pytest.mark.parametrize(
    ("allowed", "left"),
    [
        (None, [H100, T4, L4]),
        ("", []),
        ("-1", []),
        ("0", [H100]),
        ("2, 1", [L4, T4]),
        ("7", []),
        ("GPU-1234,GPU-5678", [H100, T4]),
    ],
)
def test_visible(allowed: str | None, left: list[Gpu]) -> None:
    assert gpus.visible([H100, T4, L4], allowed) == left


@pytest.mark.parametrize(
    ("gpu", "cuda", "compatible", "level"),
    [
        (H100, 13, False, "ok"),
        (A100, 13, False, "fail"),
        (A100, 13, True, "warn"),
        (A100, 12, False, "ok"),
        (T4, 12, False, "ok"),
        (Gpu("X", (9, 0), "580", 1), 13, False, "ok"),
        (Gpu("X", (9, 0), "[N/A]", 1), 13, False, "fail"),
    ],
)
def test_driver(gpu: Gpu, cuda: int, compatible: bool, level: str) -> None:
    (finding,) = gpus.driver([gpu], cuda, compatible=compatible)
    assert finding.level == level
    assert finding.text.startswith(gpu.driver)


@pytest.mark.parametrize(("version", "cuda"), [("2.11.0+cu130", 13), ("2.11.0+cu128", 12), ("2.11.0", 13), ("", 13)])
def test_cuda_of(version: str, cuda: int) -> None:
    assert gpus.cuda_of(version) == cuda


def test_the_reason_names_the_gpu() -> None:
    assert gpus.lacks("fp8", [H100, A100]) == (
        "fp8 needs compute capability 8.9 or newer, NVIDIA A100-SXM4-40GB has 8.0"
    )
    assert "below 10.0" in str(gpus.lacks("int8", [B200]))
    assert gpus.lacks("int8", [H100]) is None


def test_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert gpus.probe() is None
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, 0, " ".join(argv), "!"))
    assert str(gpus.probe()).startswith("/bin/nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total")

    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(subprocess, "run", hang)
    assert gpus.parse(gpus.probe()) == []


@pytest.mark.parametrize(
    ("environment", "count", "names"),
    [
        ({"ROCR_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "0"}, 1, ["ROCR"]),
        ({"ROCR_VISIBLE_DEVICES": "0"}, 1, ["ROCR"]),
        ({"ROCR_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "0"}, 1, []),
        ({"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0"}, 1, ["ROCR"]),
        ({"ROCR_VISIBLE_DEVICES": "0", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}, 1, []),
        ({"HIP_VISIBLE_DEVICES": "0"}, 1, []),
        ({"HIP_VISIBLE_DEVICES": "0"}, None, []),
        ({"HIP_VISIBLE_DEVICES": "0"}, 2, ["HIP"]),
        ({"HIP_VISIBLE_DEVICES": "0,1"}, 2, ["HIP"]),
        ({"HIP_VISIBLE_DEVICES": "1"}, 1, ["HIP"]),
        ({"HIP_VISIBLE_DEVICES": "3", "CUDA_VISIBLE_DEVICES": "3"}, 1, []),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "3"}, 1, ["HIP"]),
        ({"HIP_VISIBLE_DEVICES": "1", "ROCR_VISIBLE_DEVICES": "0"}, 1, ["HIP", "ROCR"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2, []),
    ],
)
def test_variables_of_amd_that_end_verls_workers(environment, count, names, monkeypatch):
    """What verl's own worker does with them, given the CUDA_VISIBLE_DEVICES that Ray gives each worker with a
    device."""
    found = list(gpus.vendors(environment, count))
    assert [finding.name for finding in found] == [f"{name}_VISIBLE_DEVICES" for name in names]
    assert [finding.fix for finding in found] == [f"unset {name}_VISIBLE_DEVICES" for name in names]
    assert {finding.level for finding in found} <= {"fail"}
    assert "memory" not in str(found)
    (taken, *_) = [finding.fix for finding in gpus.vendors(environment, count, preset=environment)] or [""]
    assert not taken or taken.startswith("take env.")


FREE = [FreeMemory(0, 81559, 2000), FreeMemory(1, 81559, 81000), FreeMemory(2, 81559, 40000)]


def test_free_memory_is_read() -> None:
    text = "0, 81559, 2000\n1, 81559, 81000\n2, 81559, 40000\nUnable to determine the device handle\n3, [N/A], 5\n"
    assert gpus.parse_free(text) == FREE


@pytest.mark.parametrize(
    ("count", "asked", "visible", "share"),
    [(1, None, "1", 0.9), (2, None, "1,2", round(40000 / 81559 - 0.03, 2)), (1, 0.2, "1", 0.2)],
)
def test_the_freest_gpus_are_chosen(count: int, asked: float | None, visible: str, share: float) -> None:
    """With vLLM's usual share, limited by the fullest of them, or the share that was asked for."""
    assert gpus.freest(count, asked, FREE) == (visible, share)


def test_too_few_gpus_with_room() -> None:
    with pytest.raises(EnvironmentNotReady, match=r"0: 2\.0 GiB"):
        gpus.freest(1, None, FREE[:1])
    with pytest.raises(EnvironmentNotReady, match="this machine has 3 GPUs"):
        gpus.freest(4, None, FREE)


def test_no_choice_where_the_user_chose_or_without_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert gpus.choose_free(1, 0.5) == (None, 0.5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.choose_free(1, None) == (None, None)


def shows(monkeypatch: pytest.MonkeyPatch, *listed: FreeMemory, allowed: str | None = None) -> None:
    """`nvidia-smi` lists these GPUs, and CUDA_VISIBLE_DEVICES is `allowed`."""
    lines = "".join(f"{gpu.index}, {gpu.total}, {gpu.free}\n" for gpu in listed)
    monkeypatch.setattr(gpus, "probe", lambda query=gpus.QUERY: lines or None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)


EIGHT = [FreeMemory(number, 100_000, 100_000 if number != 5 else 50_000) for number in range(8)]


@pytest.mark.parametrize(
    ("engines", "each", "share", "wanted"),
    [
        (None, 1, None, [(str(number), 0.47 if number == 5 else 0.9) for number in range(8)]),
        (None, 4, None, [("0,1,2,3", 0.9), ("4,5,6,7", 0.47)]),
        (None, 3, 0.5, [("0,1,2", 0.5), ("3,4,5", 0.5)]),
        (2, 1, None, [("0", 0.9), ("1", 0.9)]),
    ],
)
def test_engines_on_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, engines: int | None, each: int, share: float | None, wanted: list[object]
) -> None:
    """Each takes what is free on the fullest of its GPUs."""
    shows(monkeypatch, *EIGHT)
    assert gpus.places(engines, each, share) == wanted


def test_engines_leave_full_gpus_and_those_that_are_not_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    shows(monkeypatch, *FREE)
    assert [devices for devices, _ in gpus.places(None, 1, None)] == ["1", "2"]
    with pytest.raises(EnvironmentNotReady, match="--gpus 3, 1 GPU for an engine: 2 GPUs with free memory"):
        gpus.places(3, 1, None)
    shows(monkeypatch, *EIGHT, allowed="6, GPU-abc,2")
    assert gpus.places(None, 1, None) == [("6", None), ("GPU-abc", None), ("2", None)]
    assert gpus.places(1, 2, 0.4) == [(None, 0.4)], "one engine sees what the user chose"
    with pytest.raises(EnvironmentNotReady, match="--gpus all, 4 GPUs for an engine: 3 GPUs"):
        gpus.places(None, 4, None)


@pytest.mark.parametrize("allowed", [None, "", "-1"])
def test_several_engines_on_a_cpu(monkeypatch: pytest.MonkeyPatch, allowed: str | None) -> None:
    shows(monkeypatch, allowed=allowed)
    assert gpus.places(2, 1, None) == [(None, None)] * 2
    with pytest.raises(EnvironmentNotReady, match="--gpus all"):
        gpus.places(None, 1, None)

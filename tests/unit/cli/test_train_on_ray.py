"""`flashrl train --executor ray`: what it prints, what it refuses, what it hands on."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.cli.app import main
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.train import run
from flashrl_cli.train.executors import ray_job as ray_client
from flashrl_cli.train.executors import ray_ready
from tests.unit.train.fake_jobs import FakeJobs

RAY = ("--executor", "ray")


@pytest.fixture(autouse=True)
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def train(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["flashrl", "train", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(("preset", "nodes"), [("dapo-32b", 4), ("tiny", 1), ("gsm8k-0.5b", 1)])
def test_dry_run_shows_the_job(
    preset: str, nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--preset", preset, *RAY, "--ray-address", "http://head:8265", "--dry-run", "--json")
    assert train(monkeypatch, *words) == 0
    document = json.loads(capsys.readouterr().out)
    job = document["ray"]
    assert job["address"] == "http://head:8265"
    assert shlex.split(job["entrypoint"]) == ["exec", *document["argv"]]
    assert f"trainer.nnodes={nodes}" in document["overrides"]
    assert document["env"].items() <= job["runtime_env"]["env_vars"].items()
    assert not [override for override in document["overrides"] if "ray_init" in override]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_planned_for_the_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, "--preset", "tiny", "--sweep", "tis=off,2", *RAY, "-n", "--json") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert len(points) == 2
    assert not [o for point in points for o in point["plan"]["overrides"] if "ray_init" in o]


def test_dry_run_for_people_submits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert train(monkeypatch, "--preset", "dapo-32b", *RAY, "-n") == 0
    out = capsys.readouterr().out
    assert "exec ray job submit --no-wait \\\n  --address http://head:8265 \\\n" in out
    assert out.rstrip().endswith('-m verl.trainer.main_ppo "$@"')


def test_a_local_dry_run_knows_no_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert train(monkeypatch, "--preset", "tiny", "-n", "--json") == 0
    assert "ray" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--executor", "slurm"], "--executor slurm: there is no such executor"),
        (["--ray-address", "http://h:1"], "--ray-address without --executor ray"),
    ],
)
def test_misuse(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, "--preset", "tiny", *words) == 2
    assert told in capsys.readouterr().err


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(address: str) -> Any:
        raise EnvironmentNotReady(f"no Ray job server answers at {address}", hint="--ray-address http://HEAD:8265")

    monkeypatch.setattr(ray_client, "connect", refuse)
    assert train(monkeypatch, "--preset", "tiny", *RAY) == 3
    assert "error: no Ray job server answers at http://127.0.0.1:8265" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_supervisor_is_given_the_clusters_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, started = FakeJobs(), []

    def supervise(plan: Any, *_: Any, start: Any, **__: Any) -> int:
        plan.attempt_paths.plugins.mkdir(parents=True)
        started.append(start(plan))
        started[-1].kill()
        return 3

    monkeypatch.setattr(ray_client, "connect", lambda _: jobs)
    monkeypatch.setattr(ray_ready, "check", lambda *_: ray_ready.Readiness(shared=True, nodes=2))
    monkeypatch.setattr(run, "supervise", supervise)
    monkeypatch.setattr(run, "git_state", lambda _: None)
    assert train(monkeypatch, "--preset", "tiny", "--name", "r", *RAY) == 0
    assert "asking every node of the Ray cluster at http://127.0.0.1:8265" in capsys.readouterr().err
    last = json.loads(Path("runs/r/run.json").read_text(encoding="utf-8"))["attempts"][-1]
    assert (last["executor"], last["job_id"], last["status"]) == ("ray", started[0].id, "done")

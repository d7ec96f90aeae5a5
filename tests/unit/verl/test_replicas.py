"""Engines of a run, and those that a mix leaves in bf16."""

from __future__ import annotations

import pytest

from flashrl_cli.verl.config import DATA_PARALLEL, bf16_replicas, engine_devices, replicas
from tests.specs import load_spec


def counted(nodes: int, gpus: int, mix: float, *more: str) -> tuple[int, int]:
    sets = ["rollout.precision=int8", f"resources.nodes={nodes}", f"resources.gpus_per_node={gpus}"]
    spec = load_spec("gsm8k-0.5b", sets=[*sets, f"rollout.mix={mix}", *more]).spec
    return replicas(spec), bf16_replicas(spec)


@pytest.mark.parametrize(
    ("nodes", "gpus", "mix", "found"),
    [(1, 1, 0, (1, 0)), (1, 8, 0, (8, 0)), (1, 8, 0.01, (8, 1)), (1, 8, 0.5, (8, 4)), (1, 2, 0.6, (2, 2))],
)
def test_a_share_is_rounded_up(nodes: int, gpus: int, mix: float, found: tuple[int, int]) -> None:
    assert counted(nodes, gpus, mix) == found


def test_what_is_whole_in_decimals_is_whole() -> None:
    assert counted(10, 10, 0.07) == (100, 7)


@pytest.mark.parametrize("key", [DATA_PARALLEL, f"+{DATA_PARALLEL}"])
def test_an_engine_takes_several_devices(key: str) -> None:
    more = ("rollout.tensor_parallel=2", f"verl.{key}=2")
    assert counted(1, 8, 0.5, *more) == (2, 1)
    assert engine_devices(load_spec("gsm8k-0.5b", sets=more).spec) == 4

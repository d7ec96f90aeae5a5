"""A run that goes on elsewhere is the same run."""

from __future__ import annotations

from pathlib import Path

from flashrl_cli.config.resolve import Resolved, load_spec
from flashrl_cli.train.plan import build_plan
from flashrl_cli.train.review import plan_hash
from flashrl_cli.verl.environment import on_cluster


def hashed(resolved: Resolved) -> str:
    plan = build_plan(
        resolved,
        name="r",
        attempt=1,
        python="/venv/bin/python",
        runs_root=Path("/runs"),
        checkpoints_root=Path("/checkpoints"),
        data_root=Path("/data"),
    )
    return plan_hash(plan)


def test_a_cluster_trains_what_this_machine_trains() -> None:
    assert hashed(on_cluster(load_spec("tiny"))) == hashed(load_spec("tiny"))
    assert hashed(load_spec("tiny", sets=["algorithm.lr=1e-5"])) != hashed(load_spec("tiny"))

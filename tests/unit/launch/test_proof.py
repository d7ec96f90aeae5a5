"""What must be proven follows from the plan, and handshakes are held against it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.contract import Handshake, write_handshake
from flashrl_cli.launch import proof
from flashrl_cli.launch.plan import build_plan
from tests.saved_files import saved_profile


def expected(preset: str, rollout: str | None = None, *sets: str) -> proof.Expectation:
    resolved = load_spec(preset, rollout=rollout, sets=sets)
    root = Path("/w")
    return proof.expectation(
        build_plan(
            resolved, name="r", attempt=1, python="python", runs_root=root, checkpoints_root=root, data_root=root
        )
    )


def shake(pid: int, precision: str = "int8", smoothed: int = 0) -> Handshake:
    return Handshake(
        host="node-1",
        pid=pid,
        precision=precision,
        quantized_layers=14,
        linear_layers=15,
        quantized_bytes=1,
        kernel="K",
        vllm="0",
        torch="2",
        device="cpu",
        refits=1,
        refit_s=0.1,
        smoothed=smoothed,
    )


@pytest.mark.parametrize(
    ("preset", "rollout", "sets", "workers"),
    [
        ("tiny", None, (), 1),
        ("tiny", "bf16", (), 1),  # on a CPU the weights come by flashrl's extension whatever the precision
        ("dapo-32b", "int8", ("resources.nodes=2", "resources.gpus_per_node=8"), 16),
        ("dapo-32b", "bf16", (), 0),
        ("dapo-32b", "fp8", ("resources.nodes=1", "resources.gpus_per_node=2"), 2),
        ("dapo-32b", "fp8-block", (), 0),
    ],
)
def test_expectation(preset: str, rollout: str | None, sets: tuple[str, ...], workers: int) -> None:
    assert expected(preset, rollout, *sets) == proof.Expectation(rollout or "int8", workers)


def test_refutation_names_the_worker() -> None:
    asked = proof.Expectation("int8", 2)
    assert proof.refutation(asked, []) is None
    assert proof.refutation(asked, [shake(1), shake(2)]) is None
    told = str(proof.refutation(asked, [shake(1), shake(2, "bf16")]))
    assert "int8 rollouts were asked for, but worker 2 on node-1 holds bf16" in told


def test_a_profile_must_have_been_applied_whole(tmp_path: Path) -> None:
    file = saved_profile(tmp_path / "p.safetensors", {"a.columns": [2.0], "b.rows": [0.5]})
    asked = expected("tiny", "int8", f"rollout.profile={file}")
    assert asked == proof.Expectation("int8", 1, smoothed=2)
    assert proof.refutation(asked, [shake(1, smoothed=2)]) is None
    told = proof.refutation(asked, [shake(1, smoothed=2), shake(2, smoothed=1)])
    assert told == "2 tensors smoothed by rollout.profile were asked for, but worker 2 on node-1 smoothed 1"
    assert "smoothed 3" in str(proof.refutation(proof.Expectation("int8", 1), [shake(1, smoothed=3)]))


def test_a_profile_that_only_the_nodes_see(tmp_path: Path) -> None:
    asked = expected("tiny", "int8", f"rollout.profile={tmp_path}/none")
    assert proof.refutation(asked, [shake(1, smoothed=5)]) is None
    assert "were asked for, but worker 1 on node-1 smoothed 0" in str(proof.refutation(asked, [shake(1)]))


def test_missing_counts_workers() -> None:
    asked = proof.Expectation("int8", 2)
    assert proof.missing(asked, [shake(1), shake(2)]) is None
    assert "1 of 2 workers" in str(proof.missing(asked, [shake(1)]))
    assert proof.missing(proof.Expectation("bf16", 0), []) is None


def test_read(tmp_path: Path) -> None:
    assert proof.read(tmp_path / "none") == []
    write_handshake(tmp_path, shake(2))
    write_handshake(tmp_path, shake(1))
    assert [found.pid for found in proof.read(tmp_path)] == [1, 2]

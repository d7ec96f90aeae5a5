"""What must be proven follows from the plan, and handshakes are held against it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.contract import Handshake, write_handshake
from flashrl_cli.train import handshake
from flashrl_cli.train.plan import build_plan
from tests.saved_files import saved_profile


def expected(preset: str, rollout: str | None = None, *sets: str) -> handshake.Expectation:
    resolved = load_spec(preset, rollout=rollout, sets=sets)
    root = Path("/w")
    return handshake.expectation(
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
        ("dapo-32b", "bf16", ("rollout.lm_head_fp32=true", "resources.nodes=1", "resources.gpus_per_node=8"), 8),
    ],
)
def test_expectation(preset: str, rollout: str | None, sets: tuple[str, ...], workers: int) -> None:
    found = expected(preset, rollout, *sets)
    assert (found.precision, found.workers) == (rollout or "int8", workers)


def test_the_cache_must_be_in_8_bits_too() -> None:
    asked = expected("dapo-32b", "int8", "rollout.kv_cache=fp8", "resources.nodes=1", "resources.gpus_per_node=1")
    assert asked == handshake.Expectation("int8", 1, "fp8")
    assert "KV cache in fp8 was asked for" in str(handshake.refutation(asked, [shake(7)]))
    assert handshake.refutation(asked, [replace(shake(7), kv_cache="fp8")]) is None


def test_refutation_names_the_worker() -> None:
    asked = handshake.Expectation("int8", 2)
    assert handshake.refutation(asked, []) is None
    assert handshake.refutation(asked, [shake(1), shake(2)]) is None
    told = str(handshake.refutation(asked, [shake(1), shake(2, "bf16")]))
    assert "int8 rollouts were asked for, but worker 2 on node-1 holds bf16" in told


def test_logits_are_held_against_what_was_asked() -> None:
    asked = expected("tiny", "bf16", "rollout.lm_head_fp32=true")
    assert asked == handshake.Expectation("bf16", 1, lm_head="fp32")
    bf16 = shake(1, "bf16")
    assert handshake.refutation(asked, [replace(bf16, lm_head="fp32")]) is None
    told = str(handshake.refutation(asked, [bf16]))
    assert told == "logits in fp32 were asked for, but worker 1 on node-1 computes them in bf16"
    assert handshake.refutation(handshake.Expectation("bf16", 1), [replace(bf16, lm_head="fp32")]) is None


def test_a_mixed_run_wants_so_many_of_each() -> None:
    asked = expected("dapo-32b", "int8", "rollout.mix=0.3", "resources.nodes=1", "rollout.tensor_parallel=2")
    assert asked == handshake.Expectation("int8", 8, bf16_workers=4)
    int8, bf16 = [shake(pid) for pid in range(5)], [shake(pid, "bf16") for pid in range(5, 10)]
    for held in ([], int8[:4], bf16[:4], [*int8[:4], *bf16[:4]], [*int8[:1], *bf16[:2]]):
        assert handshake.refutation(asked, held) is None
    for held in (int8, bf16, [*int8[:1], *bf16]):
        told = str(handshake.refutation(asked, held))
        assert "4 of 8 rollout workers were to stay in bf16 and 4 to take int8" in told
    assert "holds fp8" in str(handshake.refutation(asked, [shake(1, "fp8")]))


def test_a_profile_must_have_been_applied_whole(tmp_path: Path) -> None:
    file = saved_profile(tmp_path / "p.safetensors", {"a.columns": [2.0], "b.rows": [0.5]})
    asked = expected("tiny", "int8", f"rollout.profile={file}")
    assert asked == handshake.Expectation("int8", 1, smoothed=2)
    assert handshake.refutation(asked, [shake(1, smoothed=2)]) is None
    told = handshake.refutation(asked, [shake(1, smoothed=2), shake(2, smoothed=1)])
    assert told == "2 tensors smoothed by rollout.profile were asked for, but worker 2 on node-1 smoothed 1"
    assert "smoothed 3" in str(handshake.refutation(handshake.Expectation("int8", 1), [shake(1, smoothed=3)]))


def test_a_profile_that_only_the_nodes_see(tmp_path: Path) -> None:
    asked = expected("tiny", "int8", f"rollout.profile={tmp_path}/none")
    assert handshake.refutation(asked, [shake(1, smoothed=5)]) is None
    assert "were asked for, but worker 1 on node-1 smoothed 0" in str(handshake.refutation(asked, [shake(1)]))


def test_missing_counts_workers() -> None:
    asked = handshake.Expectation("int8", 2)
    assert handshake.missing(asked, [shake(1), shake(2)]) is None
    assert "1 of 2 workers" in str(handshake.missing(asked, [shake(1)]))
    assert handshake.missing(handshake.Expectation("bf16", 0), []) is None


def test_read(tmp_path: Path) -> None:
    assert handshake.read(tmp_path / "none") == []
    write_handshake(tmp_path, shake(2))
    write_handshake(tmp_path, shake(1))
    assert [found.pid for found in handshake.read(tmp_path)] == [1, 2]

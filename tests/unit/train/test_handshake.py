"""What must be proven follows from the plan, and handshakes are compared with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.train.handshake import Expectation, expectation, missing, refutation
from tests.saved_files import saved_profile
from tests.unit.train.builders import handshake, planned


def expected(preset: str, rollout: str | None = None, *sets: str) -> Expectation:
    return expectation(planned(preset, *sets, rollout=rollout))


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
    assert asked == Expectation("int8", 1, "fp8", rotation=None)
    assert "KV cache in fp8 was asked for" in str(refutation(asked, [handshake()]))
    assert refutation(asked, [handshake(kv_cache="fp8")]) is None


def test_refutation_names_the_worker() -> None:
    asked = Expectation("int8", 2, rotation=64)
    assert refutation(asked, []) is None
    assert refutation(asked, [handshake(), handshake(pid=2)]) is None
    refuted = str(refutation(asked, [handshake(), handshake(pid=2, precision="bf16")]))
    assert "int8 rollouts were asked for, but worker 2 on node-1 holds bf16" in refuted


def test_logits_are_computed_in_what_was_asked_for() -> None:
    asked = expected("tiny", "bf16", "rollout.lm_head_fp32=true")
    assert asked == Expectation("bf16", 1, lm_head="fp32")
    fp32 = handshake(precision="bf16", lm_head="fp32")
    assert refutation(asked, [fp32]) is None
    refuted = refutation(asked, [handshake(precision="bf16")])
    assert refuted == "logits in fp32 were asked for, but worker 1 on node-1 computes them in bf16"
    assert refutation(Expectation("bf16", 1), [fp32]) is None


def test_a_mixed_run_wants_so_many_of_each() -> None:
    asked = expected("dapo-32b", "int8", "rollout.mix=0.3", "resources.nodes=1", "rollout.tensor_parallel=2")
    assert asked == Expectation("int8", 8, bf16_workers=4, rotation=None)
    int8 = [handshake(pid=pid) for pid in range(5)]
    bf16 = [handshake(pid=pid, precision="bf16", rotation=0) for pid in range(5, 10)]
    for held in ([], int8[:4], bf16[:4], [*int8[:4], *bf16[:4]], [*int8[:1], *bf16[:2]]):
        assert refutation(asked, held) is None
    for held in (int8, bf16, [*int8[:1], *bf16]):
        refuted = str(refutation(asked, held))
        assert "4 of 8 rollout workers were to stay in bf16 and 4 to take int8" in refuted
    assert "holds fp8" in str(refutation(asked, [handshake(precision="fp8")]))


def test_a_profile_must_have_been_applied_completely(tmp_path: Path) -> None:
    file = saved_profile(tmp_path / "p.safetensors", {"a.columns": [2.0], "b.rows": [0.5]})
    asked = expected("tiny", "int8", f"rollout.profile={file}")
    assert asked == Expectation("int8", 1, smoothed=2, rotation=None)
    assert refutation(asked, [handshake(smoothed=2)]) is None
    refuted = refutation(asked, [handshake(smoothed=2), handshake(pid=2, smoothed=1)])
    assert refuted == "2 tensors smoothed by rollout.profile were asked for, but worker 2 on node-1 smoothed 1"
    assert "smoothed 3" in str(refutation(Expectation("int8", 1), [handshake(smoothed=3)]))


def test_inputs_must_be_rotated_by_the_blocks_of_the_plan() -> None:
    asked = expected("tiny", "int8", "rollout.rotation=32")
    assert asked == Expectation("int8", 1, rotation=32)
    assert refutation(asked, [handshake(rotation=32)]) is None
    for held, text in ((64, "rotates them by blocks of 64"), (0, "rotates none")):
        refuted = f"inputs rotated by blocks of 32 were asked for, but worker 1 on node-1 {text}"
        assert refutation(asked, [handshake(rotation=held)]) == refuted
    off = expected("tiny", "int8", "rollout.rotation=off")
    assert off.rotation == 0
    assert "no rotation was asked for, but worker 1" in str(refutation(off, [handshake()]))
    assert refutation(off, [handshake(rotation=0)]) is None
    unknown = expected("tiny", "int8")
    assert unknown.rotation is None
    assert "inputs rotated by blocks were asked for" in str(refutation(unknown, [handshake(rotation=0)]))
    assert expected("dapo-32b", "fp8").rotation == 0


def test_a_profile_that_only_the_nodes_see(tmp_path: Path) -> None:
    asked = expected("tiny", "int8", f"rollout.profile={tmp_path}/none")
    assert refutation(asked, [handshake(smoothed=5)]) is None
    assert "were asked for, but worker 1 on node-1 smoothed 0" in str(refutation(asked, [handshake()]))


def test_missing_counts_workers() -> None:
    asked = Expectation("int8", 2)
    assert missing(asked, [handshake(), handshake(pid=2)]) is None
    assert "1 of 2 workers" in str(missing(asked, [handshake()]))
    assert missing(Expectation("bf16", 0), []) is None

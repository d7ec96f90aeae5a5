"""verl's asynchronous modes on the real stack, with INT8 rollouts and TIS."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from flashrl_cli.plugins import log_ratios, samples
from flashrl_cli.verl.metrics import ENOUGH, StepMetrics, read_step
from tests.integration.conftest import SMALL, Workshop, events
from tests.integration.test_train import INT8, check_plausible, check_proof

if TYPE_CHECKING:
    from pathlib import Path

RESPONSES, STEPS = 16 * 4, 4
OFF_POLICY = "training/off_policy/"
FRESH = 2e-3
"""Bound of the KL (k3) of tokens that are only quantized, nats a token: some 20 to 40 times what INT8 has here, and
less than what weights that do not arrive leave after two steps.
"""


def settings(mode: str, prefetch: float) -> list[str]:
    given = {
        "trainer.mode": mode,
        "trainer.prefetch": prefetch,
        "trainer.steps": STEPS,
        "trainer.save_every": -1,
        "algorithm.mini_batch_size": 8,
        "trainer.max_staleness": 2,
    }
    return [*SMALL, *(word for key, value in given.items() for word in ("--set", f"{key}={value}"))]


def logged(attempt: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (attempt / "metrics.jsonl").read_text().splitlines())
    return [line["data"] for line in lines]


def check_run(workshop: Workshop, name: str, out: str) -> list[dict[str, Any]]:
    """What holds in both modes: the proof, arrival of every update, and the second mini-batch's ratios are not all 1.

    That is so only if its old log-probs are of the weights before the first: `actor/ppo_kl` is a mean of both, and 0 of
    the first.
    """
    attempt = workshop.root / "runs" / name / "attempt_1"
    check_proof(out, attempt)
    check_plausible(events(out, "step"), RESPONSES)
    steps = logged(attempt)
    assert len(steps) == STEPS
    for step in steps:
        assert step["actor/ppo_kl"] != 0
        assert 0 < step["rollout_corr/rollout_is_eff_sample_size"] <= 1
        assert 0.9 < step["refit/arrived"] < 1.1, "each update arrived in the engines"
        assert step[OFF_POLICY + "trajectory_staleness_worst/max"] <= 1
    assert steps[0][OFF_POLICY + "trajectory_staleness_worst/max"] == 0
    assert steps[0]["rollout_corr/k3_kl"] < FRESH
    assert list(samples.steps_in(attempt / "samples")) == list(range(1, STEPS + 1))
    assert len(samples.read(samples.file_of(attempt / "samples", STEPS))) == 8
    assert list(log_ratios.steps_in(attempt / "log_ratios")) == list(range(1, STEPS + 1))
    assert workshop.leftovers() == []
    return steps


def check_staleness(steps: list[dict[str, Any]], rel: float) -> list[StepMetrics]:
    """The figures of each staleness add up to the step's, which are those of staleness 0 where there is no other.

    verl's own are means over mini-batches by their responses, and ours by their tokens: `rel` is how much they differ.
    """
    read = [read_step(number, data) for number, data in enumerate(steps, 1)]
    assert read[0].stalenesses == (0,)
    for name in ("kl", "kl_k3", "weight_mean", "effective", "truncated", "prob_diff", "prob_correlation"):
        assert read[0][f"{name}@0"] == pytest.approx(read[0][name], rel=rel, abs=rel / 100), name
    for step in read:
        assert sum(step[f"share@{number}"] or 0 for number in step.stalenesses) == pytest.approx(1)
        parts = [(step[f"share@{number}"] or 0) * (step[f"kl@{number}"] or 0) for number in step.stalenesses]
        assert sum(parts) == pytest.approx(step["kl"], rel=rel, abs=rel / 100)
    return read


def test_separate_async(workshop: Workshop) -> None:
    """Half a batch ahead: of the two mini-batches of a step the first has a staleness of 1 and the second of 0."""
    out, _ = workshop.run(
        "train", "--preset", "tiny", *INT8, *settings("separate_async", 0.5), "--name", "separate", "--json"
    )
    steps = check_run(workshop, "separate", out)
    for step in steps[1:]:
        assert 0 < step[OFF_POLICY + "trajectory_staleness/mean"] < 1
    read = check_staleness(steps, rel=0.02)
    assert {step.stalenesses for step in read[1:]} == {(0, 1)}
    assert max(step["kl_k3@0"] or 0 for step in read) < FRESH
    assert (read[1]["tokens@fresh"] or 0) >= ENOUGH, "responses of the first mini-batch, scored by what sampled them"
    fresh = read[1]["kl_k3@fresh"] or 1
    assert fresh < FRESH
    assert (read[1]["kl_k3@1"] or 0) > 3 * fresh, "a step changes this policy far more than INT8 does"


def test_colocate_async(workshop: Workshop) -> None:
    """A batch ahead on the same devices."""
    out, _ = workshop.run(
        "train", "--preset", "tiny", *INT8, *settings("colocate_async", 1), "--name", "colocate", "--json"
    )
    steps = check_run(workshop, "colocate", out)
    assert max(step[OFF_POLICY + "trajectory_staleness/max"] for step in steps) == 1, "the second batch was prefetched"
    read = check_staleness(steps, rel=1e-3)
    kept = [
        log_ratios.read(path)
        for path in log_ratios.steps_in(workshop.root / "runs/colocate/attempt_1/log_ratios").values()
    ]
    for step, sample in zip(read, kept, strict=True):
        assert sample.staleness is not None
        assert set(sample.staleness.tolist()) == set(step.stalenesses), "all responses are kept"
        assert (sample.staleness == 0).sum() == (step["tokens@0"] or 0)

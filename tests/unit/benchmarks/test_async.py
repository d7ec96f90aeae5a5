"""What benchmarks/async.py makes of the steps that a run logged."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

asynchronous = importlib.import_module("benchmarks.async")


def step(number: int, *, at: float, waits: float = 1.0, **metrics: float) -> dict[str, Any]:
    usual = {"tokens": 100, "kl_k3": 0.01, "reward": 0.5, "response_length": 10.0, "longest_response": 20.0}
    return {"step": number, "at": at, "step_s": 4.0, "seconds": {"generate": waits, "actor": 2.0}, **usual, **metrics}


def test_the_first_steps_do_not_count_and_the_clock_is_the_wall() -> None:
    steps = [step(number, at=5.0 * (number - 1), waits=9.0 if number < 4 else 1.0) for number in range(1, 6)]
    busy = {"engine": [[9.0, 1.0], [11.0, 0.25], [19.0, 0.75], [21.0, 1.0]], "trainer": [[3.0, 1.0]]}
    found = asynchronous.summary(steps, busy)
    assert (found["steps"], found["step_s"], found["median_step_s"]) == (2, 5.0, 4.0)
    assert found["waiting"] == pytest.approx(2 * 1.0 / 10.0)
    assert found["tokens_per_s"] == pytest.approx(2 * 100 / 10.0)
    assert found["seconds"] == {"generate": 1.0, "actor": 2.0}
    assert found["busy"] == {"engine": 0.5}


def test_kl_by_staleness_counts_tokens_and_not_steps() -> None:
    steps = [
        {"tokens": 40.0, "tokens@0": 30.0, "kl_k3@0": 0.1, "tokens@1": 10.0, "kl_k3@1": 0.5},
        {"tokens": 60.0, "tokens@0": 10.0, "kl_k3@0": 0.3, "tokens@1": 50.0, "kl_k3@1": 0.9},
        {"tokens": 100.0, "tokens@1": 100.0, "kl_k3@1": 0.2, "tokens@fresh": 8.0, "kl_k3@fresh": 0.05},
    ]
    found = asynchronous.by_staleness(steps)
    assert found["0"] == {"share": 0.2, "kl_k3": pytest.approx((30 * 0.1 + 10 * 0.3) / 40)}
    assert found["1"] == {"share": 0.8, "kl_k3": pytest.approx((10 * 0.5 + 50 * 0.9 + 100 * 0.2) / 160)}
    assert found["fresh"] == {"kl_k3": 0.05}, "tokens that were scored again are none of the step's"
    assert asynchronous.by_staleness([{"tokens": 40.0}]) == {}

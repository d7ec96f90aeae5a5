"""Broken rollouts are told from quantized ones."""

from __future__ import annotations

import math

import pytest

from flashrl_cli.config.spec import WatchSpec
from flashrl_cli.train.supervise import broken_rollout
from flashrl_cli.verl.metrics import StepMetrics

BOUNDS = WatchSpec()
VOCABULARY = 259
UNIFORM = math.log(VOCABULARY)
HEALTHY: dict[str, float | None] = {
    "kl": 0.002,
    "weight_mean": 0.999,
    "prob_correlation": 0.958,
    "prob_diff": 0.02,
    "rollout_nll": 0.41,
    "train_nll": 0.412,
}


def judge(values: dict[str, float | None], vocabulary: int | None = VOCABULARY) -> str | None:
    step = StepMetrics(step=1, values=HEALTHY | values, seconds={}, accuracy=None, lost=())
    return broken_rollout(step, BOUNDS, vocabulary)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kl": 0.5},
        {"kl": -0.5},
        {"weight_mean": 1.5},
        {"weight_mean": 0.5},
        {"prob_correlation": 0.9, "prob_diff": 0.9},
        {"prob_correlation": 0.02, "prob_diff": 0.0004},
        {"prob_correlation": -0.1, "prob_diff": 0.05},
        dict.fromkeys(HEALTHY),
        {"kl": None, "weight_mean": None},
        {"prob_correlation": None, "prob_diff": 0.9},
        {"prob_correlation": 0.1, "prob_diff": None},
        {"rollout_nll": UNIFORM, "train_nll": UNIFORM - 0.01},
        {"rollout_nll": UNIFORM, "train_nll": None},
        {"rollout_nll": UNIFORM - 0.1, "train_nll": UNIFORM - 0.2},
    ],
)
def test_what_truncated_importance_sampling_corrects_passes(values: dict[str, float | None]) -> None:
    assert judge(values) is None


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kl": 0.51}, "KL between rollout and trainer is 0.51 nats a token (bound 0.5)"),
        ({"kl": -0.51}, "KL between rollout and trainer is -0.51"),
        ({"kl": math.inf}, "KL between rollout and trainer is inf"),
        ({"weight_mean": 1.51}, "importance weights' mean is 1.51 (bound 1 ± 0.5)"),
        ({"weight_mean": 0.49}, "importance weights' mean is 0.49"),
        ({"prob_correlation": 0.89, "prob_diff": 0.051}, "correlate by 0.89 only (bound 0.9) and differ by 0.05"),
        ({"prob_correlation": -0.2, "prob_diff": 0.4}, "correlate by -0.20 only"),
        ({"rollout_nll": UNIFORM + 0.04, "train_nll": 0.4}, "samples uniformly: mean log-prob -5.60 = -ln(259)"),
        ({"rollout_nll": UNIFORM - 0.04, "train_nll": UNIFORM + 0.1, "kl": None}, "samples uniformly"),
        # an engine left on its dummy weights: the plainest reason is told
        ({"kl": 3.7, "weight_mean": 0.08, "rollout_nll": UNIFORM, "train_nll": 9.3}, "samples uniformly"),
        ({"kl": 3.7, "weight_mean": 0.08}, "KL between rollout and trainer is 3.7"),
    ],
)
def test_what_nothing_corrects_is_told(values: dict[str, float | None], told: str) -> None:
    assert told in str(judge(values))


def test_uniform_sampling_is_not_judged_without_the_vocabulary() -> None:
    assert judge({"rollout_nll": UNIFORM, "train_nll": 0.4}, vocabulary=None) is None


def test_bounds_are_the_specs() -> None:
    step = StepMetrics(step=1, values=HEALTHY | {"kl": 3.7, "weight_mean": 0.08}, seconds={}, accuracy=None, lost=())
    assert broken_rollout(step, WatchSpec(max_kl=4, max_weight_deviation=0.95), None) is None

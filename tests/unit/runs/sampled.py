"""Log-probs of sampled tokens, and what verl logs of them: written after verl's formulae, held to verl's code by a
contract test.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from flashrl_cli.verl.metrics import StepMetrics, read_step

Batch = list[list[tuple[float, float]]]
"""Responses of tokens: log-prob of the rollout, log-prob of the trainer."""


def ratios(batches: Sequence[Batch]) -> list[float]:
    """p_train / p_rollout of every token."""
    return [math.exp(trainer - rollout) for batch in batches for response in batch for rollout, trainer in response]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def logged(batch: Batch, cap: float | None) -> dict[str, float | None]:
    """verl's metrics of a step on `batch`, under verl's names."""
    tokens = [token for response in batch for token in response]
    logs = [trainer - rollout for rollout, trainer in tokens]
    r = [math.exp(log) for log in logs]
    differences = [abs(math.exp(trainer) - math.exp(rollout)) for rollout, trainer in tokens]
    data: dict[str, float | None] = {
        "response_length/mean": mean([len(response) for response in batch]),
        "prompt_length/mean": 10.0,
        "perf/total_num_tokens": float(len(tokens) + 10 * len(batch)),
        "rollout_corr/kl": -mean(logs),
        "rollout_corr/k3_kl": mean([one - log - 1 for one, log in zip(r, logs, strict=True)]),
        "rollout_corr/chi2_token": mean([one**2 for one in r]) - 1,
        "training/rollout_probs_diff_mean": mean(differences),
        "training/rollout_probs_diff_max": max(differences),
    }
    if cap is not None:
        w = [min(one, cap) for one in r]
        squares = mean([one**2 for one in w])
        data |= {
            "rollout_corr/rollout_is_mean": mean(w),
            "rollout_corr/rollout_is_max": max(w),
            "rollout_corr/rollout_is_std": math.sqrt(max(0.0, squares - mean(w) ** 2)),
            "rollout_corr/rollout_is_eff_sample_size": mean(w) ** 2 / squares,
            "rollout_corr/rollout_is_ratio_fraction_high": mean([float(one > cap) for one in r]),
        }
    return data


def steps(batches: Sequence[Batch], cap: float | None, first: int = 1) -> list[StepMetrics]:
    return [read_step(number, logged(batch, cap)) for number, batch in enumerate(batches, first)]


def policy(tokens: int, noise: float, rng: random.Random) -> tuple[list[float], list[float]]:
    """Next-token distributions of a rollout and of a trainer whose logits differ by normal `noise`: both sum to one."""
    logits = [rng.gauss(0, 2) for _ in range(tokens)]
    moved = [logit + rng.gauss(0, noise) for logit in logits]
    return _softmax(logits), _softmax(moved)


def _softmax(logits: Sequence[float]) -> list[float]:
    total = math.fsum(map(math.exp, logits))
    return [math.exp(logit) / total for logit in logits]


def sample(
    noise: float | Callable[[random.Random], float],
    *,
    responses: int = 40,
    length: int = 50,
    seed: int = 0,
    top: int = 0,
) -> Batch:
    """Tokens that a rollout samples (of its `top` likeliest ones alone, if given), with both log-probs.

    `noise` is the deviation of the trainer's logits at a token, or draws one.
    """
    rng = random.Random(seed)
    batch: Batch = []
    for _ in range(responses):
        response = []
        for _ in range(max(1, length + rng.randrange(-length // 2, length // 2 + 1))):
            rollout, trainer = policy(12, noise(rng) if callable(noise) else noise, rng)
            if top:
                least = sorted(rollout)[-top]
                kept = [p if p >= least else 0.0 for p in rollout]
                rollout = [p / math.fsum(kept) for p in kept]
            (token,) = rng.choices(range(12), weights=rollout)
            response.append((math.log(rollout[token]), math.log(trainer[token])))
        batch.append(response)
    return batch

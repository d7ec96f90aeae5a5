"""Does the rollout engine sample from the policy that is trained? Judged at every step, from verl's own comparison.

verl scores the sampled tokens again with the trainer. Quantization moves those log-probs a little, which truncated importance
sampling corrects; an engine whose refit is broken samples from something else, which nothing corrects. The bounds lie between:
healthy INT8 and FP8 runs show |KL| below 0.05 and a correlation above 0.95, an engine left on its dummy weights a KL
above 3 and a correlation near 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashrl_cli.config.spec import WatchSpec
    from flashrl_cli.verl.metrics import StepMetrics

UNIFORM_TOLERANCE = 0.05
"""Nats between the rollout's mean negative log-prob and ln(vocabulary) that count as sampling uniformly."""


def broken_rollout(step: StepMetrics, bounds: WatchSpec, vocabulary: int | None) -> str | None:
    """Why the rollout does not sample from the policy, or None if it does (or nothing was sampled in this step).

    KL in nats a token, absolute because verl estimates it from samples; weights are importance weights after truncation.
    """
    kl, weight = step["kl"], step["weight_mean"]
    if _samples_uniformly(step, vocabulary):
        return f"it samples uniformly: mean log-prob {-(step['rollout_nll'] or 0):.2f} = -ln({vocabulary})"
    if kl is not None and abs(kl) > bounds.max_kl:
        return f"KL between rollout and trainer is {kl:.3g} nats a token (bound {bounds.max_kl:g})"
    if weight is not None and abs(weight - 1) > bounds.max_weight_deviation:
        return f"the importance weights' mean is {weight:.3g} (bound 1 ± {bounds.max_weight_deviation:g})"
    return _uncorrelated(step, bounds)


def _samples_uniformly(step: StepMetrics, vocabulary: int | None) -> bool:
    rollout, trainer = step["rollout_nll"], step["train_nll"]
    if vocabulary is None or rollout is None or trainer is None:
        return False
    uniform = math.log(vocabulary)
    # an untrained policy is uniform itself: then both agree and nothing is wrong
    return abs(rollout - uniform) < UNIFORM_TOLERANCE and abs(trainer - rollout) > UNIFORM_TOLERANCE


def _uncorrelated(step: StepMetrics, bounds: WatchSpec) -> str | None:
    correlation, difference = step["prob_correlation"], step["prob_diff"]
    if correlation is None or difference is None:
        return None
    # a policy that is sure of every token has no spread to correlate, so a low correlation alone proves nothing
    if correlation < bounds.min_correlation and difference > bounds.max_prob_difference:
        return (
            f"probabilities of the sampled tokens correlate by {correlation:.2f} only (bound {bounds.min_correlation:g}) "
            f"and differ by {difference:.2f} on average"
        )
    return None

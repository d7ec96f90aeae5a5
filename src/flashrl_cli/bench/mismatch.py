"""How far two distributions over the same tokens are apart: those were sampled by the rollout engine, and the trainer judges them.

r = p_train / p_rollout is the weight that truncated importance sampling gives a token. KL(rollout || train) is estimated from samples
of the rollout by k1 = -log r and by k3 = r - 1 - log r, which is never negative and varies less (J. Schulman, Approximating KL
Divergence, 2020). The effective sample size is Kish's, (sum r)² / sum r², as a share of the samples (L. Kish, Survey Sampling, 1965).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CAPS = (2.0, 8.0)
"""Caps of TIS in use: verl's default, and that of recipes for large models."""
_CLOSE_TO_UNIFORM = 0.9
_LARGEST = 600.0
"""Logarithm of a weight from which on it counts as no larger: products over a sequence must stay finite."""


def statistics(rollout: Any, train: Any, lengths: Any) -> dict[str, Any]:
    """Statistics of natural log-probs [T] of sampled tokens by rollout and trainer; `lengths` [S] of the sequences that they make up.

    Raises ValueError for shapes that do not fit, and for values that are no log-probs.
    """
    before, after = (np.asarray(values, dtype=np.float64) for values in (rollout, train))
    counts = np.asarray(lengths, dtype=np.int64)
    fits = before.shape == after.shape and before.ndim == 1 and counts.sum() == before.size > 0 and (counts > 0).all()
    if not fits:
        raise ValueError(f"{before.shape} and {after.shape} log-probs in {counts.size} sequences do not fit")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("some log-probs are not finite")
    difference = after - before
    absolute = np.abs(difference)
    sums = np.add.reduceat(difference, np.concatenate(([0], np.cumsum(counts)[:-1])))
    return {
        "tokens": before.size,
        "sequences": counts.size,
        "abs_difference": {
            "mean": float(absolute.mean()),
            "p99": float(np.quantile(absolute, 0.99)),
            "max": float(absolute.max()),
        },
        "kl": {"k1": float(-difference.mean()), "k3": float(np.mean(np.expm1(difference) - difference))},
        "token_weights": weights(difference),
        "sequence_weights": weights(sums),
        "sequence_geometric": weights(sums / counts),
    }


def weights(log_ratios: NDArray[np.float64]) -> dict[str, float]:
    """Of weights r with these logarithms: mean, least and greatest, the shares above each cap, and the effective sample size."""
    ratios = np.exp(np.minimum(log_ratios, _LARGEST))
    scaled = np.exp(log_ratios - log_ratios.max())  # their squares must not overflow
    above = {f"above_{cap:g}": float(np.mean(ratios > cap)) for cap in CAPS}
    effective = float(scaled.sum() ** 2 / (scaled**2).sum() / scaled.size)
    return {
        "mean": float(ratios.mean()),
        "min": float(ratios.min()),
        "max": float(ratios.max()),
        **above,
        "effective": effective,
    }


def knows_nothing(entropy: float, vocabulary: int) -> bool:
    """Whether a mean entropy in nats is that of a policy with random weights, which hides what quantization does."""
    return entropy > _CLOSE_TO_UNIFORM * float(np.log(vocabulary))

"""The mismatch between rollout and trainer: `python -m flashrl_cli.bench.scorer JOB.json` scores responses.

The trainer's log-probs come from a forward pass of Transformers over complete sequences, as verl's trainer computes
them: weights and activations in bf16 (or float32), and the log-softmax of the logits in float32 (as flash-attn's cross
entropy does for verl/utils/torch_functional.py:logprobs_from_logits).

r = p_train / p_rollout is the importance weight that truncated importance sampling (TIS) gives a token. KL(rollout ||
train) is estimated from samples of the rollout by k1 = -log r, and by k3 = r - 1 - log r, which is never negative and
has a smaller variance (J. Schulman, Approximating KL Divergence, 2020). The effective sample size is Kish's, (sum r)² /
sum r², as a fraction of the samples (L. Kish, Survey Sampling, 1965).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashrl_cli.bench.job import Samples
from flashrl_cli.text import counted
from flashrl_cli.worker import server

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

CAPS = (2.0, 8.0)
"""Caps of TIS in use: verl's default, and that of recipes for large models."""
_CLOSE_TO_UNIFORM = 0.9
_LARGEST = 600.0
"""Upper limit of the logarithm of a weight, so that products over a sequence stay finite."""


def statistics(rollout: Any, train: Any, lengths: Any) -> dict[str, Any]:
    """Statistics of the natural log-probs [T] that rollout and trainer give to sampled tokens.

    `lengths` [S] are the lengths of the sequences that the tokens form. Raises ValueError for inconsistent shapes and
    for values that are not log-probs.
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
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    sums = np.add.reduceat(difference, starts)
    estimates = np.expm1(difference) - difference
    return {
        "tokens": before.size,
        "sequences": counts.size,
        "abs_difference": {
            "mean": float(absolute.mean()),
            "p99": float(np.quantile(absolute, 0.99)),
            "max": float(absolute.max()),
        },
        "kl": {
            "k1": float(-difference.mean()),
            "k3": float(np.mean(estimates)),
            "k3_error": _error(np.add.reduceat(estimates, starts), counts),
        },
        "token_weights": weights(difference),
        "sequence_weights": weights(sums),
        "sequence_geometric": weights(sums / counts),
    }


def _error(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Standard error of a mean over all tokens, from its sums by sequence, whose tokens depend on each other.

    It is that of a ratio of means (W. Cochran, Sampling Techniques, 1977, chapter 6); 0 for a single sequence.
    """
    if counts.size < 2:
        return 0.0
    residuals = sums - sums.sum() / counts.sum() * counts
    return float(np.sqrt(counts.size / (counts.size - 1) * (residuals**2).sum()) / counts.sum())


def weights(log_ratios: NDArray[np.float64]) -> dict[str, float]:
    """Statistics of importance weights r, given as log r.

    They are mean, minimum, maximum, the fraction above each cap, and the effective sample size.
    """
    ratios = np.exp(np.minimum(log_ratios, _LARGEST))
    scaled = np.exp(log_ratios - log_ratios.max())  # scaled so that the squares do not overflow
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
    """Whether a mean entropy in nats is that of a policy with random weights, which hides quantization errors."""
    return entropy > _CLOSE_TO_UNIFORM * float(np.log(vocabulary))


TOKENS = {"cuda": 8192, "cpu": 2048}
"""Maximum tokens of one forward pass, including padding: logits of a large vocabulary in bf16 then take 2.5 GB."""
_ROWS = 1024
"""Number of positions whose float32 log-softmax is computed at once."""


def serve(job: dict[str, Any], orders: server.Orders, emit: server.Emit) -> None:
    """Execute orders, each of which names a file of samples."""
    scorer = Scorer(**job)
    for asked in orders:
        emit("done", result=scorer.score(Path(asked["samples"]), emit))


class Scorer:
    """The HF model in the folder `model` in Transformers, computed in `dtype` on the first visible GPU or the CPU."""

    def __init__(self, model: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        found = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self._model = found.to(self._device).eval()
        self._dtype = dtype

    def score(self, file: Path, emit: server.Emit) -> dict[str, Any]:
        """`statistics` of the samples in `file`, the mean entropy in nats, and whether that is a random policy's."""
        samples = Samples.read(file)
        train: list[list[float]] = [[] for _ in samples.responses]
        entropy = 0.0
        for numbers in _batches(samples, TOKENS[self._device]):
            for number, (logprobs, entropies) in zip(numbers, self._judge(samples, numbers), strict=True):
                train[number] = logprobs
                entropy += entropies
            emit("advance", note=f"{counted(len(numbers), 'response')} scored")
        lengths = [len(part) for part in samples.responses]
        mean_entropy = entropy / sum(lengths)
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        return {
            **statistics(_flat(samples.logprobs), _flat(train), lengths),
            "trainer_dtype": self._dtype,
            "entropy": mean_entropy,
            "vocabulary": vocabulary,
            "knows_nothing": knows_nothing(mean_entropy, vocabulary),
        }

    def _judge(self, samples: Samples, numbers: list[int]) -> Iterator[tuple[list[float], float]]:
        """For each of the samples `numbers`, the log-probs of its response's tokens, and the sum of their entropies."""
        import torch

        rows = [[*samples.prompts[number], *samples.responses[number]] for number in numbers]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self._device)
        with torch.inference_mode():
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for place, number in enumerate(numbers):
                first, last = len(samples.prompts[number]), len(rows[place])
                yield _logprobs(logits[place, first - 1 : last - 1], ids[place, first:last])


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[list[float], float]:
    """Log-probs of tokens [T] under logits [T, V], and the sum of the T entropies."""
    found: list[float] = []
    entropy = 0.0
    for part, labels in zip(logits.split(_ROWS), tokens.split(_ROWS), strict=True):
        every = part.float().log_softmax(-1)
        found += every.gather(-1, labels[:, None])[:, 0].tolist()
        entropy -= float((every.exp() * every).nan_to_num().sum())
    return found, entropy


def _batches(samples: Samples, tokens: int) -> Iterator[list[int]]:
    """Yield batches of samples of similar length, by their numbers.

    A padded batch has at most `tokens` tokens, or a single sample.
    """
    sizes = [len(prompt) + len(response) for prompt, response in zip(samples.prompts, samples.responses, strict=True)]
    batch: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        if batch and (len(batch) + 1) * sizes[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _flat(parts: Any) -> list[float]:
    return [value for part in parts for value in part]


if __name__ == "__main__":
    server.run(serve)

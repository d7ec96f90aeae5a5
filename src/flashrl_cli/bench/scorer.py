"""The trainer's side of the mismatch: `python -m flashrl_cli.bench.scorer JOB.json` computes log-probs of what engines have sampled.

A forward pass of Transformers over whole sequences, as verl's trainer computes them: weights and activations in bf16 (or float32), the
log-softmax of the logits in float32 (as flash-attn's cross entropy does for verl/utils/torch_functional.py:logprobs_from_logits).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli.bench.job import ScorerJob
from flashrl_cli.errors import FlashrlError
from flashrl_cli.evals import parent
from flashrl_cli.text import counted

if TYPE_CHECKING:
    import torch

    from flashrl_cli.bench.samples import Samples

TOKENS = {"cuda": 8192, "cpu": 2048}
"""Of one forward pass, padding included: logits of a large vocabulary in bf16 take 2.5 GB then."""
_ROWS = 1024
"""Positions whose float32 log-softmax is computed at once."""


def main() -> None:
    """Fulfil orders until stdin closes: each names a file of samples."""
    orders, emit = parent.begin()
    try:
        scorer = Scorer(ScorerJob.read(Path(sys.argv[1])))
        while True:
            asked = json.loads(orders.get())
            emit("done", result=scorer.score(Path(asked["samples"]), emit))
    except FlashrlError as error:
        parent.end(emit, error)


class Scorer:
    """A model of Transformers, on the first visible GPU if there is one."""

    def __init__(self, job: ScorerJob) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
        )
        self._model = model.to(self._device).eval()
        self._job = job

    def score(self, file: Path, emit: parent.Emit) -> dict[str, Any]:
        """Mismatch of the samples in `file`: `mismatch.statistics`, the mean entropy in nats, and whether that is a random policy's."""
        from flashrl_cli.bench import mismatch
        from flashrl_cli.bench.samples import Samples

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
            **mismatch.statistics(_flat(samples.logprobs), _flat(train), lengths),
            "trainer_dtype": self._job.dtype,
            "entropy": mean_entropy,
            "vocabulary": vocabulary,
            "knows_nothing": mismatch.knows_nothing(mean_entropy, vocabulary),
        }

    def _judge(self, samples: Samples, numbers: list[int]) -> Iterator[tuple[list[float], float]]:
        """For each of the samples `numbers`: log-probs of its response's tokens, and the sum of the entropies there."""
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
    """Numbers of samples of like length, so many that a padded batch has at most `tokens`, or one."""
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
    main()

"""Log-probs and entropy of logits, a chunk of tokens at a time, in place of verl's loop over single tokens.

Without the flash-attn package verl 0.9.1 computes log-probs by a Python loop over the rows of the logits
(verl/utils/torch_functional.py:173, from https://github.com/verl-project/verl/pull/220, where a row was a sequence).
In the FSDP engine a row is a token (verl/workers/engine/fsdp/transformer_impl.py:1428 and 1522): tens of thousands of
kernels a micro-batch forward and as many backward, and under bf16 each log-prob is rounded to bf16. Its entropy keeps
three float32 tensors of the size of the logits (:226), and its chunked entropy keeps them as well for the backward pass
(https://github.com/verl-project/verl/issues/2448).

Here the arithmetic is float32 within a chunk and nothing of a chunk is kept: the backward pass computes its softmax
again. The gradients are those of

    log p_y = z_y - log sum_j exp z_j        d log p_y / d z_j = [j = y] - p_j
    H = - sum_j p_j log p_j                  d H / d z_j = - p_j (log p_j + H)
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

import torch

from flashrl_cli import contract
from flashrl_cli.contract import PATCHED, VERL


def chunks(logits: torch.Tensor, most: int | None = None) -> Iterator[slice]:
    """Slices of the rows of logits [rows, vocabulary], each within the bound in bytes, and of `most` rows at most."""
    bound = contract.LOG_PROBS_CHUNK_CPU if logits.device.type == "cpu" else contract.LOG_PROBS_CHUNK
    size = max(1, bound // (4 * logits.shape[-1]))
    if most is not None:
        size = min(size, most)
    return (slice(first, first + size) for first in range(0, len(logits), size))


def wide(logits: torch.Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or the logits' own if that is wider."""
    return torch.promote_types(logits.dtype, torch.float32)


class LogProbs(torch.autograd.Function):
    """Log-probs of labels [rows] under logits [rows, vocabulary].

    PyTorch's softmax is the fastest kernel that there is, but on a CPU it adds up a vocabulary of 152k with an error of
    2e-5. The probabilities of a row are therefore divided by their exact sum: with t of them in all and the largest one
    p at the logit z, the logarithm of the sum of all exp is z - log p + log t.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool) -> torch.Tensor:
        """The log-probs [rows] in `wide(logits)`; the backward pass may overwrite the logits if asked to."""
        found, totals = (logits.new_empty(len(logits), dtype=wide(logits)) for _ in range(2))
        for rows in chunks(logits):
            p = torch.softmax(logits[rows], -1, dtype=found.dtype)
            totals[rows] = p.sum(-1)
            found[rows] = p.amax(-1).log_() - totals[rows].log() - logits[rows].amax(-1)
        ctx.save_for_backward(logits, labels, totals)
        ctx.inplace = inplace_backward
        return found.add_(logits.gather(-1, labels[:, None])[:, 0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the logits in their dtype."""
        logits, labels, totals = ctx.saved_tensors
        result = logits.detach() if ctx.inplace else torch.empty_like(logits)
        for rows in chunks(logits):
            weight = gradient[rows, None]
            part = torch.softmax(logits[rows], -1, dtype=gradient.dtype).mul_(-weight / totals[rows, None])
            result[rows] = part.scatter_add_(-1, labels[rows, None], weight)
        return result, None, None


class Entropy(torch.autograd.Function):
    """Entropies in nats of the distributions that logits [rows, vocabulary] define."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, most: int | None) -> torch.Tensor:
        """The entropies [rows] in `wide(logits)`, of at most `most` rows at a time."""
        sums, found = (logits.new_empty(len(logits), dtype=wide(logits)) for _ in range(2))
        for rows in chunks(logits, most):
            # with x = z - max z and S = sum exp x, H = log S - (sum x exp x) / S, where no term is negative
            top = logits[rows].amax(-1, keepdim=True).to(found.dtype)
            part = logits[rows] - top
            powers = part.exp()
            total = powers.sum(-1)
            found[rows] = total.log() - powers.mul_(part).sum(-1).div_(total)
            sums[rows] = total.log_().add_(top[:, 0])
        ctx.save_for_backward(logits, sums, found)
        ctx.most = most
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of the logits in their dtype."""
        logits, sums, entropies = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in chunks(logits, ctx.most):
            log_p = logits[rows] - sums[rows, None]
            part = log_p.exp().mul_(-gradient[rows, None])
            result[rows] = part.mul_(log_p.add_(entropies[rows, None]))
        return result, None


def overwritable(logits: torch.Tensor) -> bool:
    """Whether the memory of logits can take their gradient: it is dense, and no parameter's."""
    base = logits if logits._base is None else logits._base
    return logits.is_contiguous() and not base.is_leaf


def log_probs(logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True) -> torch.Tensor:
    """Log-probs of labels [...] under logits [..., vocabulary], in float32 (float64 of float64).

    The gradient has the logits' dtype. With `inplace_backward` the backward pass writes it over the logits, so that
    nothing else may need them then; autograd refuses a backward pass of something that does. Raises ValueError for
    labels of another shape.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {list(labels.shape)} do not fit logits {list(logits.shape)}")
    flat = logits.reshape(-1, logits.shape[-1])
    found: torch.Tensor = LogProbs.apply(flat, labels.reshape(-1), inplace_backward and overwritable(flat))
    return found.view(labels.shape)


@torch.compiler.disable
def entropy(logits: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
    """Entropies [...] in nats under logits [..., vocabulary], in float32 (float64 of float64).

    `chunk_size` bounds the tokens at a time further. The gradient has the logits' dtype. torch.compile, which would
    trace it anew for each number of chunks, leaves it as it is.
    """
    found: torch.Tensor = Entropy.apply(logits.reshape(-1, logits.shape[-1]), chunk_size)
    return found.view(logits.shape[:-1])


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """verl's function of this name, which its engine may compile: only a function within it can be left out of that."""
    return entropy(logits)


def entropy_from_logits_with_chunking(logits: torch.Tensor, chunk_size: int = 2048) -> torch.Tensor:
    """verl's function of this name."""
    return entropy(logits, chunk_size)


def apply() -> None:
    """Have verl compute log-probs and entropies in chunks wherever it would loop over tokens (idempotent).

    flash-attn's cross-entropy is used as before where it is installed, and then verl's own entropy too. Raises
    RuntimeError for a verl other than 0.9.1.
    """
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl computes log-probs in chunks with verl {VERL} only")
    import verl.utils.torch_functional as verls

    original = verls.logprobs_from_logits
    if getattr(original, PATCHED, False):
        return

    def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True) -> torch.Tensor:
        flash = verls.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE") != "1"
        if logits.device.type != "cpu" and (flash or verls.NPU_CROSS_ENTROPY_LOSS_AVAILABLE):
            return original(logits, labels, inplace_backward)
        return log_probs(logits, labels, inplace_backward)

    contract.replace_in_verl(verls, logprobs_from_logits)
    if not verls.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE:
        contract.replace_in_verl(verls, entropy_from_logits)
        contract.replace_in_verl(verls, entropy_from_logits_with_chunking)

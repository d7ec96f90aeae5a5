"""Log-probs and entropy in chunks on a CUDA GPU: equal to float64, and within the memory of a chunk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA GPU and the GPU stack"),
]
VOCABULARY, TOKENS = 152064, 8192
CLOSE = 1e-5


def peak_of(work: Callable[[], object]) -> tuple[int, float]:
    """The most bytes that `work` allocates beyond what is there, and its seconds."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, begin.elapsed_time(end) / 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_to_float64(dtype: str) -> None:
    import torch

    from flashrl_cli.plugins import log_probs

    torch.manual_seed(0)
    leaf = (4 * torch.randn(600, VOCABULARY, device="cuda")).to(getattr(torch, dtype)).requires_grad_()
    labels = torch.randint(VOCABULARY, (600,), device="cuda")
    assert len(list(log_probs.chunks(leaf))) > 1
    pairs: tuple[tuple[Any, Any], ...] = (
        (log_probs.log_probs, lambda one: one.log_prob(labels)),
        (lambda logits, _: log_probs.entropy(logits), lambda one: one.entropy()),
    )
    for ours, theirs in pairs:
        leaf.grad = None
        found = ours(leaf * 1, labels)
        found.sum().backward()
        exact = leaf.detach().double().requires_grad_()
        right = theirs(torch.distributions.Categorical(logits=exact))
        right.sum().backward()
        assert found.dtype == torch.float32
        assert (found - right).abs().max() < CLOSE
        assert leaf.grad is not None
        assert exact.grad is not None
        assert torch.allclose(leaf.grad.double(), exact.grad, rtol=2**-7 if dtype == "bfloat16" else 1e-4, atol=1e-6)
        del exact, right


def test_no_float32_copy_of_the_logits(record_property: Callable[[str, object], None]) -> None:
    import torch

    from flashrl_cli.plugins import log_probs

    leaf = torch.randn(TOKENS, VOCABULARY, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
    size = leaf.numel() * leaf.element_size()
    some = 3 * log_probs.CHUNK_BYTES
    assert some < size

    def measured(name: str, work: Callable[[torch.Tensor], torch.Tensor], more: int) -> None:
        with torch.no_grad():
            peak, seconds = peak_of(lambda: work(leaf))
        record_property(f"{name}, forward", [peak, seconds])
        assert peak < some, name
        logits = leaf * 1
        kept: list[torch.Tensor] = []
        peak, _ = peak_of(lambda: kept.append(work(logits)))
        assert peak < some, name
        # the gradient of the logits is asked for alone: nothing else is computed
        peak, seconds = peak_of(lambda: torch.autograd.grad(kept.pop().sum(), logits))
        record_property(f"{name}, backward", [peak, seconds])
        assert peak < more + some, name

    measured("log_probs", lambda logits: log_probs.log_probs(logits, labels), 0)
    measured("log_probs, kept", lambda logits: log_probs.log_probs(logits, labels, inplace_backward=False), size)
    measured("entropy", log_probs.entropy, size)
    measured("entropy, compiled", torch.compile(log_probs.entropy_from_logits, dynamic=True), size)

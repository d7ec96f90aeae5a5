"""Logits in float32 and the doctor's reload test on a CUDA GPU."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from flashrl_cli import contract
from flashrl_cli.doctor import reload
from flashrl_cli.precision import REFITTED

if TYPE_CHECKING:
    import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA GPU and the GPU stack"),
]
VOCABULARY, HIDDEN, TOKENS = 152064, 3584, 256
"""The head of Qwen2.5-7B."""


def seconds(call: Any, repeats: int = 20) -> float:
    """Of one call on the GPU, the mean of `repeats`."""
    import torch

    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed / repeats / 1000


def head(weight: torch.Tensor) -> Any:
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return SimpleNamespace(weight=weight, quant_method=UnquantizedEmbeddingMethod())


def test_the_bf16_kernel_gives_float32_logits_without_a_float32_copy(record_property: Any) -> None:
    import torch

    from flashrl_cli.plugins.linear import float32_logits

    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16) / 60
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    exact = hidden[:8].double() @ weight.double().t()
    logits = float32_logits(head(weight), hidden)
    assert (logits.dtype, logits.shape) == (torch.float32, (TOKENS, VOCABULARY))
    assert (logits[:8].double() - exact).abs().max() < 1e-4
    assert (torch.nn.functional.linear(hidden[:8], weight).double() - exact).abs().max() > 1e-3
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    float32_logits(head(weight), hidden)
    assert torch.cuda.max_memory_allocated() - before < 2 * logits.nbytes
    ours = seconds(lambda: float32_logits(head(weight), hidden))
    plain = seconds(lambda: torch.nn.functional.linear(hidden, weight).float())
    cast = seconds(lambda: torch.nn.functional.linear(hidden.float(), weight.float()), 3)
    found = {"ours_ms": 1000 * ours, "bf16_then_float_ms": 1000 * plain, "both_cast_ms": 1000 * cast}
    print(f"float32 logits of {TOKENS} tokens, {VOCABULARY} x {HIDDEN}: {json.dumps(found)}")
    record_property("float32_head", json.dumps(found))
    assert ours < 2 * plain


@pytest.mark.parametrize("precision", REFITTED)
def test_the_reload_test_passes(precision: str) -> None:
    findings, measured = reload.reload_test(precision)
    print(precision, json.dumps(measured))
    assert [finding for finding in findings if finding.level != "ok"] == []


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_an_engine_with_logits_in_float32(precision: str, tmp_path: Path) -> None:
    """Closer to Transformers in float32 than the engine that rounds them, where nothing else is rounded more."""
    errors = {}
    for asked in (False, True):
        folder = tmp_path / str(asked)
        folder.mkdir()
        options = contract.RolloutOptions(lm_head_fp32=asked).text()
        env = {**reload.environment(folder), contract.ENV_ROLLOUT: options, "PYTHONPATH": os.pathsep.join(sys.path)}
        found = reload.measure(precision, folder, env)
        assert found["holds"]["lm_head"] == ("fp32" if asked else "bf16")
        errors[asked] = found["read_error"]
    print(precision, errors)
    assert errors[True] < (1.0 if precision == "bf16" else 1.1) * errors[False]

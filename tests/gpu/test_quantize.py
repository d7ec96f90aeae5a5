"""Checkpoints quantized on disk, loaded by stock vLLM on a CUDA GPU, against engines that quantize the same weights
while loading them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.test_refit import engine, pytestmark
from tests.integration.test_refit import answers, mean_difference, sequences

__all__ = ["pytestmark"]
NEAR = 0.01
"""Mean |Δ log-prob| in INT8: vLLM's kernel multiplies by 127 / max|w| instead of dividing, which shows where a value
lies half-way.
"""


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_an_engine_is_the_same_whoever_quantized(policy: Path, tmp_path: Path, scheme: str) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / scheme
    command = [sys.executable, "-m", "flashrl_cli", "quantize", str(policy), "--scheme", scheme, "-o", str(folder)]
    subprocess.run(command, check=True, timeout=120)
    rows, length = sequences(AutoTokenizer.from_pretrained(policy))
    job: dict[str, Any] = {"sequences": rows, "load_format": "auto", "refits": []}
    # no method is named for the folder: vLLM takes the one in its config.json
    offline = engine({**job, "model": str(folder), "precision": "bf16"}, tmp_path / "offline")
    online = engine({**job, "model": str(policy), "precision": scheme, "rotation": 0}, tmp_path / "online")
    if scheme == "fp8":
        assert offline["logprobs"] == online["logprobs"]
        assert offline["generated"] == online["generated"]
    difference = mean_difference(*(answers(one["logprobs"], length) for one in (offline, online)))
    assert difference < NEAR

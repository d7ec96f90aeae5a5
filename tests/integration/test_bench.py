"""`flashrl bench` through the real vLLM and Transformers, on a policy that knows something."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.bench.scorer import Scorer
from tests.integration.conftest import Workshop

ARGUMENTS = (
    *("bench", "--rollout", "int8", "--refit", "--mismatch", "--data", "tiny", "--samples", 16),
    *("--batch", "2,3", "--prompt", 8, "--response", 16, "--repeats", 2, "--dir", "points", "--json"),
)


@pytest.fixture(scope="module")
def document(workshop: Workshop) -> Any:
    out, _ = workshop.run(*ARGUMENTS)
    return json.loads(out)


def test_speed_refit_and_mismatch_of_int8_are_measured(workshop: Workshop, document: dict[str, Any]) -> None:
    (int8,) = document["variants"]
    (holds,) = int8["engine"]["holds"]
    assert (int8["status"], holds["precision"], holds["quantized_layers"]) == ("ok", "int8", holds["linear_layers"])
    assert holds["rotation"] == 128
    assert [(speed["batch"], len(speed["values"])) for speed in int8["speed"]] == [(2, 2), (3, 2)]
    assert all(value > 0 for speed in int8["speed"] for value in speed["values"])
    assert int8["engine"]["weights_bytes"] > holds["quantized_bytes"]
    model = workshop.root / "data" / "tiny" / "model" / "model.safetensors"
    assert (len(int8["refit"]["values"]), int8["refit"]["bytes"]) == (5, tensor_bytes(model))
    mismatch = int8["mismatch"]
    assert mismatch["sequences"] == 16
    assert mismatch["tokens"] > 16 * 4, "worked sums are longer: something cut the responses"
    assert not mismatch["knows_nothing"]
    # quantization changes log-probs, and little: the weights on both sides are the same
    assert mismatch["abs_difference"]["mean"] > 0
    # E[w] = 1 over what the engine samples, within five standard errors; by Kish, 1 / effective = 1 + variance / mean²
    weights = mismatch["token_weights"]
    error = weights["mean"] * math.sqrt((1 / weights["effective"] - 1) / mismatch["tokens"])
    assert abs(weights["mean"] - 1) < 5 * error


def tensor_bytes(file: Path) -> int:
    """Of a safetensors file: what follows its table, whose length stands in the first 8 bytes."""
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def test_what_was_measured_is_not_measured_again(workshop: Workshop, document: dict[str, Any]) -> None:
    out, err = workshop.run(*ARGUMENTS)
    assert json.loads(out) == document
    assert "starting an engine" not in err


def test_another_model_is_far_from_what_the_engine_sampled(
    workshop: Workshop, document: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    (samples,) = (workshop.root / "points").glob("*.npz")
    other = tmp_path / "other"
    shutil.copytree(workshop.root / "data" / "tiny" / "model", other)
    weights = load_file(other / "model.safetensors")
    spoilt = {name: value.roll(1, 0) if "down_proj" in name else value for name, value in weights.items()}
    save_file(spoilt, other / "model.safetensors", metadata={"format": "pt"})
    found = Scorer(str(other), "bfloat16").score(samples, lambda *_, **__: None)
    assert found["abs_difference"]["mean"] > 5 * document["variants"][0]["mismatch"]["abs_difference"]["mean"]

"""The two schemes of a W8A8 checkpoint, and how compressed-tensors describes them to a reader.

Weights: symmetric, one scale per output channel, max|w| / 127 or / 448; activations: symmetric, one scale per token, made by the engine.
That is what `--rollout int8` and `--rollout fp8` make of weights as they are loaded (plugins/int8_linear.py, plugins/fp8_linear.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashrl_cli.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a weight is stored: `largest` is the largest value of its `dtype` (safetensors' name), `least` the smallest scale.

    `kind` is compressed-tensors' type, `format` its name for how the values lie in the file.
    """

    name: str
    dtype: str
    kind: str
    format: str
    largest: float
    least: float

    def config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """config.json's `quantization_config`: all linear layers but those that `ignore` names or matches.

        As compressed-tensors writes it (compressed_tensors/quantization/quant_config.py), and as vLLM reads it since 0.24
        (vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py:_quantization_scheme_map_from_config).
        """
        bits = {"num_bits": 8, "type": self.kind, "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": {**bits, "strategy": "channel", "dynamic": False},
            "input_activations": {**bits, "strategy": "token", "dynamic": True},
            "output_activations": None,
            "format": self.format,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }


INT8 = Scheme(name="int8", dtype="I8", kind="int", format="int-quantized", largest=127.0, least=1e-8)
FP8 = Scheme(
    name="fp8", dtype="F8_E4M3", kind="float", format="float-quantized", largest=448.0, least=1 / (448.0 * 512.0)
)
"""The smallest scale is that of vLLM's kernel (csrc/quantization/w8a8/fp8/common.cuh, min_scaling_factor)."""
SCHEMES = {scheme.name: scheme for scheme in (INT8, FP8)}


def named(name: str) -> Scheme:
    """The scheme that `--scheme` names. Raises InputError."""
    if name in SCHEMES:
        return SCHEMES[name]
    raise InputError(f"--scheme {name}: unknown", hint="int8 or fp8")

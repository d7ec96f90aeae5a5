"""Scales of an FP8 KV cache, computed from the weights at every refit.

vLLM uses 1 for each scale that a checkpoint does not contain (`set_default_quant_scales` in
vllm/model_executor/layers/attention/attention.py), and values above e4m3's maximum of 448 saturate silently. Its own
calibration is deprecated and happens once, with an engine's initial dummy weights.

Here the scales follow from an upper bound. Attention reads the output of an RMSNorm, g * u with |u| <= sqrt(H), so row
w of a projection with bias b gives at most sqrt(H) |g * w| + |b| (Cauchy-Schwarz). Rotary embeddings mix two rows,
which gives at most sqrt(2) times that, and YaRN multiplies both by more than 1. Heads that are normalized themselves
(Qwen3) reach sqrt(d) max|g|. Since e4m3 is a floating-point format, its relative error within its range does not depend
on the scale: the scale has to be safe but not tight, and a power of two is exact. Families whose norms compute
something else (Gemma's 1 + g, LayerNorm's bias) are refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import Attention

from flashrl_cli import contract
from flashrl_cli.precision import BY_CACHE_DTYPE

if TYPE_CHECKING:
    from flashrl_cli.plugins.coverage import Bucket

LARGEST = 448.0
"""Largest finite value of float8_e4m3fn."""
MARGIN = 1.15
"""Factor for the rounding errors of a product of FP8 weights and activations, (1 + 2^-4)^2, and of bf16."""
BACKENDS = {"FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN"}
"""Attention backends that read the scales at every step.

FlashInfer keeps the scales of its first step, and CUDA graphs keep its host-side numbers
(vllm/v1/attention/backends/flashinfer.py:1476, :1806 in 0.24), while the cache is written with the new ones.
"""
_FP8 = {dtype for dtype, name in BY_CACHE_DTYPE.items() if name == "fp8"}
_NAME = re.compile(
    r"(?:^|\.)layers\.(\d+)\."
    r"(?:self_attn\.(?:([qkv])_proj\.(weight|bias)|([qk])_norm\.weight)|(input_layernorm)\.weight)$"
)
_INDEX = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(slots=True)
class _Seen:
    """The tensors that arrived for one layer, as copies, because their source buffers are overwritten."""

    gain: torch.Tensor | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    """Squared norms of the rows of g * w, by projection."""
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    width: int = 0

    def settle(self) -> None:
        """Reduce the projections whose norm has arrived to their row norms, and free them."""
        if self.gain is None:
            return
        square = self.gain.float().square()
        for part, weight in self.weights.items():
            self.squares[part] = weight.float().square() @ square
        self.weights.clear()

    def bound(self, part: str, amplitude: float) -> torch.Tensor:
        """Upper bound of the absolute values of queries, keys or values, a float32 scalar.

        Raises KeyError for a tensor that did not arrive.
        """
        rotated = 1.0 if part == "v" else math.sqrt(2) * amplitude
        if part in self.norms:
            gain = self.norms[part].float()
            return rotated * math.sqrt(gain.numel()) * gain.abs().max()
        rows = self.squares[part].sqrt() * math.sqrt(self.width)
        if part in self.biases:
            rows = rows + self.biases[part].float().abs()
        return rotated * rows.max()


class KvScales:
    """Observes the weights of one refit, then sets the scales of `layers` (attention layers by layer number).

    `amplitude` is the factor by which rotary embeddings multiply queries and keys.
    """

    def __init__(self, layers: dict[int, Any], amplitude: float = 1.0) -> None:
        self._layers, self._amplitude = layers, amplitude
        # a layerwise reload of a model in bf16 moves the scales to the meta device until its end
        self._devices = {index: layer._k_scale.device for index, layer in layers.items()}
        self._seen: dict[int, _Seen] = {}

    def bucket(self, weights: Bucket) -> Bucket:
        """Yield the bucket unchanged, recording tensors with the names of Hugging Face's Llama, Qwen2 and Qwen3."""
        for name, tensor in weights:
            found = _NAME.search(name)
            if found and int(found[1]) in self._layers:
                self._note(found, tensor)
            yield name, tensor

    def _note(self, found: re.Match[str], tensor: torch.Tensor) -> None:
        index, part, kind, normed, before = found.groups()
        seen = self._seen.setdefault(int(index), _Seen())
        # an evaluation's weights are in CPU memory, except those that a profile changed
        tensor = tensor.to(self._devices[int(index)], copy=True)
        if before:
            seen.gain = tensor
        elif normed:
            seen.norms[normed] = tensor
        elif kind == "bias":
            seen.biases[part] = tensor
        else:
            seen.width = tensor.shape[1]
            seen.weights[part] = tensor
        seen.settle()

    def set(self) -> None:
        """Set the scales; to be called after all weights are loaded.

        Raises RuntimeError if the tensors of a layer did not arrive under known names.
        """
        try:
            bounds = [[self._seen[index].bound(part, self._amplitude) for part in "qkv"] for index in self._layers]
        except KeyError as missing:
            message = (
                f"no scale for the FP8 KV cache, as the weight update lacked {missing}: take rollout.kv_cache=auto"
            )
            raise RuntimeError(message) from missing
        found = torch.stack([torch.stack(row) for row in bounds]).tolist()
        for layer, row in zip(self._layers.values(), found, strict=True):
            for part, bound in zip("qkv", row, strict=True):
                _set(layer, part, scale(bound))
        self._seen.clear()
        keep_over_sleep()


def scale(bound: float) -> float:
    """The power of two that divides values up to `bound` so that they fit into e4m3; 1 if `bound` is 0."""
    return 2.0 ** math.ceil(math.log2(MARGIN * bound / LARGEST)) if bound > 0 else 1.0


def keep_over_sleep() -> None:
    """Preserve the scales when the KV cache wakes up, which follows the refit in verl's order (idempotent).

    vLLM then resets all scales to 1, and its code notes that restoring calibrated ones is still to be done
    (`init_fp8_kv_scales`, vllm/v1/worker/gpu_model_runner.py:939 in 0.24, :1031 in 0.28). It resets only the buffers,
    not the Python floats next to them.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.init_fp8_kv_scales
    if getattr(original, contract.PATCHED, False):
        return

    def init_fp8_kv_scales(self: Any) -> None:
        original(self)
        for layer in self.compilation_config.static_forward_context.values():
            if type(layer) is Attention and layer.kv_cache_dtype in _FP8:
                for part in "kv":
                    _set(layer, part, getattr(layer, f"_{part}_scale_float"))

    init_fp8_kv_scales.__wrapped__ = original  # type: ignore[attr-defined]
    setattr(init_fp8_kv_scales, contract.PATCHED, True)
    GPUModelRunner.init_fp8_kv_scales = init_fp8_kv_scales


def _set(layer: Any, part: str, value: float) -> None:
    """Set a scale as `set_default_quant_scales` does: CUDA graphs read the buffer, other backends the Python float."""
    getattr(layer, f"_{part}_scale").fill_(value)
    setattr(layer, f"_{part}_scale_float", value)
    if hasattr(layer, f"_{part}_scale_cpu"):
        getattr(layer, f"_{part}_scale_cpu").fill_(value)


def of(model: torch.nn.Module, family: str) -> KvScales | None:
    """The KvScales of a model with one scale per layer; None for 16-bit caches and other kinds of scales.

    Raises RuntimeError for a `family` (model_type) without a known bound, and for attention that would not read new
    scales.
    """
    layers = {
        int(found[1]): layer
        for layer in model.modules()
        if type(layer) is Attention and layer.kv_cache_dtype in _FP8
        if (found := _INDEX.search(layer.layer_name))
    }
    if not layers:
        return None
    if family not in contract.CACHE_FAMILIES:
        known = ", ".join(contract.CACHE_FAMILIES)
        raise RuntimeError(f"no scale for the FP8 KV cache of {family} (of {known} only): take rollout.kv_cache=auto")
    if unlike := {layer.attn_backend.get_name() for layer in layers.values()} - BACKENDS:
        raise RuntimeError(f"{min(unlike)} does not read new scales of an FP8 KV cache: take rollout.kv_cache=auto")
    return KvScales(layers, _amplitude(model))


def _amplitude(model: torch.nn.Module) -> float:
    """Largest cosine in the model's tables of rotary embeddings.

    It exceeds 1 under YaRN, which multiplies the tables (vllm/.../rotary_embedding/yarn_scaling_rope.py:81).
    """
    tables = (getattr(layer, "cos_sin_cache", None) for layer in model.modules())
    return max((float(table[0].abs().max()) for table in tables if table is not None), default=1.0)


def precision(model: torch.nn.Module) -> str:
    """The KV cache's precision as `rollout.kv_cache` names it, if it is that of every layer, else `auto`."""
    kinds = {BY_CACHE_DTYPE.get(layer.kv_cache_dtype, "auto") for layer in model.modules() if type(layer) is Attention}
    return kinds.pop() if len(kinds) == 1 else "auto"

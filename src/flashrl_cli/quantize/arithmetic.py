"""The two schemes of a W8A8 checkpoint, and the arithmetic of 8-bit weights on a CPU with its error.

Weights are symmetric with one scale per output channel, max|w| / 127 or max|w| / 448; activations are symmetric with
one scale per token, computed by the engine. `--rollout int8` and `--rollout fp8` quantize weights in the same way when
they load them (plugins/linear.py). Each row is quantized separately, in pieces that fit into a core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    import torch

_PIECE = 2**18
"""Number of elements that are processed at once."""
_NUMBER = 0x7F
"""All bits of an e4m3 except its sign: 0 is stored as 0 and as -0."""
_E4M3 = ~0x4000
"""Mask for an e4m3 that was shifted into a float16 by 7 bits: all bits but the highest one of the exponent, which holds
the sign.
"""
_HALVES = 2.0**8
"""Factor between the exponent biases of float16 and e4m3, 15 and 7."""
_ROUNDING = 1 + 2.0**-20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a weight is stored: `largest` is the largest value of its `dtype`, `least` the smallest scale.

    `dtype` is the name in safetensors, `kind` the type in compressed-tensors, `format` its name for the layout in the
    file.
    """

    name: str
    dtype: str
    kind: str
    format: str
    largest: float
    least: float

    def config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json: all linear layers except those that `ignore` names or matches.

        It has the form in which compressed-tensors writes it (compressed_tensors/quantization/quant_config.py) and vLLM
        reads it since 0.24 (vllm/model_executor/layers/quantization/compressed_tensors/,
        _quantization_scheme_map_from_config).
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


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over a weight: W², (W − its 8-bit values × scales)², stored zeros, and values beyond the range."""

    square: float = 0.0
    error: float = 0.0
    zeros: int = 0
    clipped: int = 0

    def __add__(self, other: Losses) -> Losses:
        return Losses(
            self.square + other.square,
            self.error + other.error,
            self.zeros + other.zeros,
            self.clipped + other.clipped,
        )


class Room:
    """Buffers for one block of a weight and for one piece of that block, which a thread reuses."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, torch.Size], tuple[torch.Tensor, ...]] = {}
        self._memory: dict[str, torch.Tensor] = {}

    def bits(self, shape: torch.Size) -> torch.Tensor:
        """A buffer of 16-bit integers in the shape of a block."""
        return self._of("int16", shape, 1)[0]

    def floats(self, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        """Two float32 buffers in the shape of a piece."""
        return self._of("float32", shape, 2)

    def _of(self, dtype: str, shape: torch.Size, count: int) -> tuple[torch.Tensor, ...]:
        """The buffers for a shape, cached: creating the views for every piece takes 5 % of the total time."""
        import torch

        if (dtype, shape) not in self._tensors:
            size = count * shape.numel()
            if dtype not in self._memory or self._memory[dtype].numel() < size:
                self._memory[dtype] = torch.empty(size, dtype=getattr(torch, dtype))
                self._tensors.clear()
            self._tensors[dtype, shape] = self._memory[dtype][:size].view(count, *shape).unbind()
        return self._tensors[dtype, shape]


def quantize(weight: torch.Tensor, scheme: Scheme, values: torch.Tensor, scales: torch.Tensor, room: Room) -> Losses:
    """Write the 8-bit values [N, K] and float32 scales [N, 1] of a weight [N, K].

    The weight has 16 or 32 bits; float32 is rounded to bf16 first.

    scale = max|w| / scheme.largest, value = w / scale, rounded to even: this is the computation of plugins/linear.py on
    a CPU, and of vLLM's kernel for fp8 (csrc/quantization/w8a8/fp8/common.cu, dynamic_per_token_scaled_fp8_quant).
    Raises ValueError for values that are not finite.
    """
    import torch

    if weight.element_size() > 2:
        weight = weight.bfloat16()
    largest = _largest(weight, room)
    torch.div(largest, scheme.largest, out=scales).clamp_min_(scheme.least)
    if not scales.isfinite().all():
        raise ValueError("it holds values that are no finite numbers")
    norms = torch.empty(2, *scales.shape)
    step = max(1, _PIECE // weight.shape[1])
    for piece in zip(*(one.split(step) for one in (weight, scales, values, *norms)), strict=True):
        _quantize(scheme, room, *piece)
    square, error = norms.mul_(scales).double().square_().sum(dim=(1, 2)).tolist()
    return Losses(square, error, _zeros(values), _beyond(weight, largest, scheme.largest * _ROUNDING * scales))


def _largest(weight: torch.Tensor, room: Room) -> torch.Tensor:
    """max|w| of each row [N, 1], from the bits read as integers, which order positive floats equally and faster."""
    import torch

    bits = room.bits(weight.shape)
    torch.abs(weight, out=bits.view(weight.dtype))
    return bits.amax(dim=1, keepdim=True).view(weight.dtype).float()


def _quantize(
    scheme: Scheme,
    room: Room,
    weight: torch.Tensor,
    scales: torch.Tensor,
    values: torch.Tensor,
    norms: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Quantize some rows; sets `norms` [N, 1] of w / scale, and `errors` of rounding to 8 bits.

    Each pass is one call for all rows, because a call costs as much as tens of thousands of values.
    """
    import torch

    scaled, rounded = room.floats(weight.shape)
    scaled.copy_(weight).div_(scales)
    torch.linalg.vector_norm(scaled, dim=1, keepdim=True, out=norms)
    if scheme is INT8:
        values.copy_(torch.round(scaled, out=rounded))
        rounded.sub_(scaled)
    else:
        rounded.copy_(_halves(values.copy_(scaled), room))
        torch.sub(scaled, rounded, alpha=_HALVES, out=rounded)
    torch.linalg.vector_norm(rounded, dim=1, keepdim=True, out=errors)


def _halves(values: torch.Tensor, room: Room) -> torch.Tensor:
    """Convert e4m3 to float16 values, _HALVES times too small, by shifting bits: much faster on a CPU than torch."""
    import torch

    moved = room.bits(values.shape).copy_(values.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(_E4M3)
    return moved.view(torch.float16)


def _zeros(values: torch.Tensor) -> int:
    """Number of values stored as 0; numpy counts many times faster than torch."""
    import numpy as np
    import torch

    numbers = values if values.dtype == torch.int8 else values.view(torch.int8) & _NUMBER
    return int(numbers.numel() - np.count_nonzero(numbers.numpy()))


def _beyond(weight: torch.Tensor, largest: torch.Tensor, limits: torch.Tensor) -> int:
    """Number of values outside the range; there are none if each scale is derived from the row's largest value."""
    if not bool((largest > limits).any()):
        return 0
    return int((weight.abs() > limits).sum())

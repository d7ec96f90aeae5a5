"""The arithmetic of weights in 8 bits on a CPU, and what it loses: each row by itself, in pieces that a core's cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli.quantize.scheme import INT8, Scheme

if TYPE_CHECKING:
    import torch

_PIECE = 2**18
"""Elements that are worked on at once."""
_NUMBER = 0x7F
"""All bits of an e4m3 but its sign: 0 is stored as 0 and as -0."""
_E4M3 = -0x78100000
"""Mask of an e4m3 that was moved into a float32: the sign, and the seven bits from 20 on."""
_ROUNDING = 1 + 2.0**-20


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over the values of a weight: W², (W − its 8-bit values × scales)², stored zeros, and values beyond the range."""

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
    """Memory for one piece of a weight, which a thread uses again and again."""

    def __init__(self) -> None:
        self._columns = 0

    def of(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Three tensors [rows, columns]: one of integers in 16 bits, two of float32."""
        import torch

        if columns != self._columns:
            size = max(_PIECE, columns)
            self._bits, self._floats = torch.empty(size, dtype=torch.int16), torch.empty(2, size)
            self._columns = columns
        bits, scaled, rounded = (one[: rows * columns].view(rows, columns) for one in (self._bits, *self._floats))
        return bits, scaled, rounded


def quantize(weight: torch.Tensor, scheme: Scheme, values: torch.Tensor, scales: torch.Tensor, room: Room) -> Losses:
    """Write the 8-bit values [N, K] and float32 scales [N, 1] of a weight [N, K] in 16 or 32 bits; float32 is rounded to bf16 first.

    scale = max|w| / scheme.largest, value = w / scale, rounded to even: what plugins/int8_linear.py computes on a CPU, and vLLM's kernel
    for fp8 (csrc/quantization/w8a8/fp8/common.cu, dynamic_per_token_scaled_fp8_quant). Raises ValueError for what is no number.
    """
    import torch

    step = max(1, _PIECE // weight.shape[1])
    norms = torch.empty(2, *scales.shape)
    zeros = clipped = 0
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        found = _quantize(weight[rows], scheme, room, values[rows], scales[rows], norms[:, rows])
        zeros, clipped = zeros + found[0], clipped + found[1]
    if not scales.isfinite().all():
        raise ValueError("it holds values that are no finite numbers")
    square, error = norms.mul_(scales).double().square_().sum(dim=(1, 2)).tolist()
    return Losses(square, error, zeros, clipped)


def _quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    room: Room,
    values: torch.Tensor,
    scales: torch.Tensor,
    norms: torch.Tensor,
) -> tuple[int, int]:
    """The values and scales of some rows, norms [2, N, 1] of w / scale and of its rounding error; counts of zeros and of clipped values."""
    import torch

    if weight.element_size() > 2:
        weight = weight.bfloat16()
    bits, scaled, rounded = room.of(*weight.shape)
    torch.abs(weight, out=bits.view(weight.dtype))
    # positive floats are ordered as the integers of the same bits, whose largest is found sooner
    largest = bits.amax(dim=1, keepdim=True).view(weight.dtype).float()
    torch.div(largest, scheme.largest, out=scales).clamp_min_(scheme.least)
    torch.div(scaled.copy_(weight), scales, out=scaled)
    if scheme is INT8:
        numbers = values.copy_(torch.round(scaled, out=rounded))
    else:
        numbers = values.copy_(scaled).view(torch.int8) & _NUMBER
        _widen(values, rounded)
    zeros = numbers.numel() - int(numbers.count_nonzero())
    torch.linalg.vector_norm(scaled, dim=1, keepdim=True, out=norms[0])
    torch.linalg.vector_norm(rounded.sub_(scaled), dim=1, keepdim=True, out=norms[1])
    return zeros, _beyond(weight, largest, scheme.largest * _ROUNDING * scales)


def _widen(values: torch.Tensor, out: torch.Tensor) -> None:
    """e4m3 to float32, many times faster than torch's own conversion on a CPU: bits moved into place, the exponents' biases evened."""
    import torch

    moved = out.view(torch.int32)
    moved.copy_(values.view(torch.int8)).bitwise_left_shift_(20).bitwise_and_(_E4M3)
    out.mul_(2.0**120)


def _beyond(weight: torch.Tensor, largest: torch.Tensor, limits: torch.Tensor) -> int:
    """Values that do not fit the range; the scale of a row is made so that there are none."""
    if not bool((largest > limits).any()):
        return 0
    return int((weight.abs() > limits).sum())

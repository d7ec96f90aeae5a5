"""Rotation of a linear layer's input by blocks, which spreads its outliers before they are rounded to INT8.

For an orthogonal matrix R, x W^T = (x R)(W R)^T. With R = diag(H, ..., H) / sqrt(b), where H is the Hadamard matrix of
size b by Sylvester's construction (entries 1 and -1, H H^T = b I), each value of a block becomes a sum of all of them.
One large channel then no longer sets the step by which its whole row is rounded. QuaRot (Ashkboos et al., 2024, arXiv
2404.00456, section 3) and SpinQuant (Liu et al., 2024, arXiv 2405.16406) rotate models offline; here the input is
rotated in each layer, and the rows of its weight at each refit, so that no other part of the model changes.

H is not normalized: activations are multiplied by H, and weights by H / b. Both are exact but for the sums, which are
computed in float32.

vLLM has a Hadamard kernel (`hadacore_transform`, vllm/_custom_ops.py:3826 in 0.24), which reads and writes x in 16 bits
once more and rounds what it computes to them. The kernel here rotates, finds the largest value of a row, and rounds,
with a single read of x and 8 bits written.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch.library import Library
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import direct_register_custom_op

from flashrl_cli.precision import largest_block

MOST_ELEMENTS = 1 << 15
"""Elements of a row that the kernel holds in registers; longer rows are rotated before they are quantized."""
SPARE_BYTES = 2 << 10
"""Shared memory that the kernel needs besides its two operands."""


class Rotation:
    """The block that all 8-bit layers of an engine share, as `RolloutOptions.rotation` asks for it."""

    def __init__(self, asked: int | str = 0) -> None:
        self.asked = asked
        self._common = 0
        """Greatest common divisor of the widths of all inputs; 0 before the first."""

    def include(self, layer: str, width: int) -> None:
        """Include a layer whose input on this rank has `width` channels. Raises ValueError if its blocks do not fit."""
        if isinstance(self.asked, int) and self.asked and width % self.asked:
            raise ValueError(
                f"blocks of {self.asked} do not divide the {width} input channels of {layer} on a rank: "
                f"take another rollout.rotation, or off"
            )
        self._common = math.gcd(self._common, width)

    @property
    def block(self) -> int:
        """The block; 0 for none. To be read when all layers are included, which is before their weights are loaded."""
        return self.asked if isinstance(self.asked, int) else largest_block([self._common])


@cache
def hadamard(block: int, device: torch.device) -> torch.Tensor:
    """The Hadamard matrix [block, block] of Sylvester's construction, float32, with entries 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotated(values: torch.Tensor, block: int) -> torch.Tensor:
    """Each block of the last dimension times `hadamard(block)`, in float32 and the shape of `values`."""
    parts = values.reshape(-1, block).float() @ hadamard(block, values.device)
    return parts.view(values.shape)


@triton.jit
def _rotate_and_round(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    factor: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    parts: tl.constexpr,
) -> None:
    """Rotate and quantize one row of `width` elements, `parts` (a power of two) blocks with those beyond its end."""
    row = tl.program_id(0)
    # a weight has more elements than 32 bits count; within a row they suffice
    start = row.to(tl.int64) * width
    column = tl.arange(0, block)
    place = tl.arange(0, parts)[:, None] * block + column[None, :]
    inside = place < width
    found = tl.load(values + start + place, mask=inside, other=0.0)
    # the sign of an entry is the parity of the bits that its row and its column have in common
    common = column[:, None] & column[None, :]
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    signs = (1 - 2 * (common & 1)).to(found.dtype)
    # products of 16-bit numbers with 1 and -1 are exact, and their sums are float32
    turned = tl.dot(found, signs)
    largest = tl.maximum(tl.max(tl.max(tl.abs(turned), axis=1), axis=0), 1.27e-6)
    # adding 1.5 * 2^23 leaves no bits for a fraction: the nearest integer, and the even one of two
    nearest = (turned * (127.0 / largest) + 12582912.0) - 12582912.0
    tl.store(codes + start + place, nearest.to(tl.int8), mask=inside)
    tl.store(scales + row, largest / 127.0 * factor)


def quantize_rows(
    values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, block: int, factor: float = 1.0
) -> None:
    """Write the INT8 codes [M, K] and float32 scales [M, 1] of the rotated rows of a 16-bit `values` [M, K] on CUDA.

    All three are contiguous. The scales are multiplied by `factor`.
    """
    width = values.shape[-1]
    count = values.numel() // width
    if count == 0:
        return
    # tl.dot takes no fewer than 16 rows
    parts = max(16, triton.next_power_of_2(width // block))
    elements = parts * block
    if elements > MOST_ELEMENTS or 2 * (elements + block * block) + SPARE_BYTES > _shared_bytes(values.device):
        torch.ops._C.dynamic_scaled_int8_quant(codes, rotated(values, block), scales, None)
        scales.mul_(factor)
        return
    warps = min(16, max(4, elements // 2048))
    _rotate_and_round[(count,)](values, codes, scales, factor, width, block, parts, num_warps=warps)


@cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory of a thread block on a GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def rotate_and_quantize(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 codes in the shape of `x` [..., K], and float32 scales [M, 1] of its M rows, rotated by blocks, on CUDA."""
    x = x.contiguous()
    codes, scales = _empty(x, block)
    quantize_rows(x, codes, scales, block)
    return codes, scales


def _empty(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, torch.empty(x.numel() // x.shape[-1], 1, dtype=torch.float32, device=x.device)


_LIBRARY = Library("flashrl", "FRAGMENT")
"""Must live as long as the operator, which torch.compile takes as one node and CUDA graphs capture."""
direct_register_custom_op(
    "rotate_and_quantize", rotate_and_quantize, fake_impl=_empty, target_lib=_LIBRARY, dispatch_key="CUDA"
)

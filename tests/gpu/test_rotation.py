"""The kernel that rotates and rounds on a CUDA GPU: equal to PyTorch, row by row, compiled and in CUDA graphs."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA GPU and the GPU stack"),
]
SHAPES = [
    *((3, width, block) for width, block in ((576, 64), (1536, 128), (96, 32), (48, 16))),
    *((17, width, 128) for width in (3584, 5120, 18944, 27648)),
    (5, 2368, 64),  # 7B's MLP on one of 8 ranks
    (2, 53248, 128),  # longer than the kernel holds
]
"""Rows, channels and block of inputs; the widths are those of SmolLM2-135M and of Qwen2.5's 7B and 32B."""


def inputs(rows: int, width: int, dtype: str) -> torch.Tensor:
    """Rows of different sizes with an outlier channel; one is zero if there are several."""
    import torch

    torch.manual_seed(0)
    values = 3 * torch.rand(rows, 1, device="cuda") * torch.randn(rows, width, device="cuda")
    values[:, 3] *= 50
    if rows > 2:
        values[1] = 0
    return values.to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "width", "block"), SHAPES)
def test_equal_to_pytorch(rows: int, width: int, block: int, dtype: str) -> None:
    """In float64: sums of a block in another order may turn a value near a half to the other integer."""
    import torch

    from flashrl_cli.plugins import rotation

    values = inputs(rows, width, dtype)
    codes, scales = torch.ops.flashrl.rotate_and_quantize(values, block)
    parts = values.double().view(-1, block) @ rotation.hadamard(block, values.device).double()
    exact = parts.view(rows, width)
    steps = exact.abs().amax(1, keepdim=True) / 127
    assert ((scales - steps).abs() <= 1e-5 * steps + 1e-8).all()
    off = (codes.double() - exact / steps.clamp_min(1e-8)).abs()
    assert (codes.dtype, codes.shape) == (torch.int8, values.shape)
    assert off.max() < 0.5 + 1e-3, "the nearest integer, but for the error of float32"


def test_a_rows_codes_do_not_depend_on_the_others() -> None:
    """A refit quantizes the shards of a weight one by one, and a fresh engine the whole of it."""
    import torch

    from flashrl_cli.plugins.rotation import quantize_rows

    weight = inputs(48, 3584, "bfloat16")
    whole = torch.empty_like(weight, dtype=torch.int8), torch.empty(48, 1, device="cuda")
    parts = torch.empty_like(whole[0]), torch.empty_like(whole[1])
    quantize_rows(weight, *whole, 128, 1 / 128)
    for rows in (slice(0, 7), slice(7, 40), slice(40, 48)):
        quantize_rows(weight[rows], parts[0][rows], parts[1][rows], 128, 1 / 128)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_a_rotated_product_is_the_product() -> None:
    """Of weights and inputs that INT8 holds exactly enough: with outliers, much nearer than without the rotation."""
    import torch
    from vllm import _custom_ops as ops

    from flashrl_cli.plugins.rotation import quantize_rows

    x, weight = inputs(64, 3584, "bfloat16"), inputs(256, 3584, "bfloat16")
    weight[:, 3] /= 50
    exact = x.double() @ weight.double().t()
    errors = {}
    for block in (0, 128):
        codes, scales = torch.empty_like(weight, dtype=torch.int8), torch.empty(256, 1, device="cuda")
        if block:
            quantize_rows(weight, codes, scales, block, 1 / block)
            given = torch.ops.flashrl.rotate_and_quantize(x, block)
        else:
            torch.ops._C.dynamic_scaled_int8_quant(codes, weight, scales, None)
            given = ops.scaled_int8_quant(x)[:2]
        found = ops.cutlass_scaled_mm(given[0], codes.t(), given[1], scales, out_dtype=torch.bfloat16)
        errors[block] = float((found.double() - exact).norm() / exact.norm())
    assert errors[128] < 0.05
    assert errors[128] < errors[0] / 4, errors


def test_compiled_and_in_a_graph_it_gives_the_same() -> None:
    import torch

    def work(values: torch.Tensor) -> torch.Tensor:
        codes, scales = torch.ops.flashrl.rotate_and_quantize(values * 2, 128)
        return codes.float() * scales

    values = inputs(16, 3584, "bfloat16")
    wanted = work(values)
    assert torch.equal(torch.compile(work, fullgraph=True)(values), wanted)
    static = torch.zeros_like(values)
    graph = torch.cuda.CUDAGraph()
    work(static)
    with torch.cuda.graph(graph):
        held = work(static)
    static.copy_(values)
    graph.replay()
    assert torch.equal(held, wanted)
    assert work(values[:0]).shape == (0, 3584)

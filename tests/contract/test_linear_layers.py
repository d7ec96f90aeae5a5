"""benchmarks/linear_layers.py on a CPU: what it packs for vLLM's W8A16 kernels, and what it sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch  # noqa: TID253
from benchmarks import linear_layers
from benchmarks.linear_layers import Work

pytestmark = pytest.mark.filterwarnings("ignore")


def weight(outputs: int, inputs: int) -> torch.Tensor:
    """A bf16 weight with an outlier in each row, and a row of zeros."""
    found = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    found[:, 3] *= 9
    found[1] = 0
    return found


def test_packed_weights_unpack_to_their_codes() -> None:
    """By arithmetic: a word holds four input channels as digits to the base 256, each 128 above its code."""
    codes, _ = linear_layers.rows_for_16_bits(weight(8, 16))
    words = linear_layers.gptq(codes)
    assert (words.dtype, words.shape) == (torch.int32, (4, 8))
    for channel in range(16):
        for output in range(8):
            word = int(words[channel // 4, output]) % 2**32
            assert word // 256 ** (channel % 4) % 256 - 128 == int(codes[output, channel])


def test_the_packing_is_vllms() -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import gptq_pack

    codes, _ = linear_layers.rows_for_16_bits(weight(64, 128))
    assert torch.equal(linear_layers.gptq(codes), gptq_pack(codes.t().int() + 128, 8, 128, 64))


def test_a_scale_is_rounded_before_its_row_is_divided_by_it() -> None:
    """So each weight but the largest of its row, which may be clipped, is within half a step of the bf16 scale."""
    given = weight(32, 256)
    codes, scales = linear_layers.rows_for_16_bits(given)
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (32, 1))
    steps = scales.double()
    off = (linear_layers.doubled(codes, scales) - given.double()).abs()
    clipped = given.double().abs() > 127.5 * steps
    assert (off[~clipped] <= 0.5001 * steps.expand_as(off)[~clipped]).all()
    assert (off[clipped] <= 0.02 * given.double().abs()[clipped]).all()
    assert (codes[1] == 0).all()


def test_shapes_are_those_of_the_fused_layers() -> None:
    found = linear_layers.shapes("7b")
    assert found == {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
    assert all(inputs % 128 == outputs % 128 == 0 for outputs, inputs in linear_layers.shapes("32b").values())


def test_tiles_leave_no_input_out() -> None:
    for tokens in (16, 64, 256, 4096):
        for outputs, inputs in linear_layers.shapes("32b").values():
            for tile in linear_layers.tiles(tokens, outputs, inputs, 132):
                assert inputs % tile.inputs == 0
                assert tile.tokens >= 16
                assert tile.parts == 1 or tokens <= 64


def result(us: float) -> dict[str, Any]:
    """A layer's result at 16 tokens."""
    return {"batches": {"16": {"us": [us, us + 5, us]}}}


def test_a_models_time_is_that_of_all_its_layers() -> None:
    names = linear_layers.shapes("7b")
    kernels: dict[str, Any] = {
        "int8 rotated": {"7b": {layer: result(10.0) for layer in names}},
        "bf16": {"7b": {layer: result(30.0) for layer in names}},
        "w8a16 marlin": {"7b": {"qkv": result(1.0)}, "error": "its process ended with -11"},
    }
    found = linear_layers.totals(kernels, Work(("7b",), [16]))
    assert found == {"7b": {"16": {"int8 rotated": 1.12, "bf16": 3.36, "int8 rotated, qkv bf16": 1.68}}}
    (line,) = linear_layers.table({"7b": {"16": {"int8": 2.0, "bf16": 3.0}}})
    assert line == "7b, 16 tokens, ms: int8 2.00 (1.00), bf16 3.00 (1.50)"


def test_a_kernel_that_fails_is_recorded_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no such kernel")
        yield

    monkeypatch.setattr(Work, "of", fails)
    assert linear_layers.in_this_process("bf16", Work(("7b",), [16])) == {"error": "RuntimeError: no such kernel"}

"""Time the linear layers of Qwen2.5's shapes by kernel on one CUDA GPU, and compare each with float64.

    python -m benchmarks.linear_layers [--sizes 7b,32b] [--rows 16,64,256,4096] [--kernels NAME,NAME] [--budget 110]

The question is whether weights in INT8 beside activations in 16 bits (W8A16) are a precision worth having: where
decoding is bound by reading weights, they read as few bytes as INT8 on both sides does, and round nothing else. The
kernels are

- `bf16`: cuBLAS
- `int8`, `int8 rotated`, `fp8`: vLLM's CUTLASS kernels and its quantization of each token, or the rotation before it
- `int8 rotated in passes`: the rotation of a row in pieces, twice: for its largest value, and to round it. It does the
  work twice, and holds less of a row at once than `plugins/rotation.py` does
- `w8a16 machete`, `w8a16 marlin`: vLLM's kernels for GPTQ's 8 bits (`uint8b128`, one scale for each output channel).
  vLLM's third one, AllSpark, ends below compute capability 9.0 (quantization/utils/allspark_utils.py:31 in 0.24).
- `w8a16 rows`: a Triton kernel that reads INT8 rows as a refit writes them, without repacking
- `w8a16 to bf16`: the weight converted to bf16 at each call, then cuBLAS (for prefill)

Each kernel runs in a forked process, so that one that fails is recorded with its error and spoils no other. Times are
those of CUDA graphs that go through more copies of a weight than the L2 cache holds. `error` is the relative distance
to the float64 product of weight and input, `kernel_error` that to the float64 product of the rounded operands.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# asks NVML for the GPU instead of CUDA, which a forked process could not use any more
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch  # noqa: TID253 - for the Triton kernel, whose names must be those of the module
from vllm.triton_utils import tl, triton  # noqa: TID253

from flashrl_cli import files
from flashrl_cli.memory.model import QWEN25, SIZES
from flashrl_cli.precision import largest_block

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

OUT = Path("benchmarks/results/linear_layers.json")
ROWS = "16,64,256,4096"
SPREAD_BYTES = 256 << 20
"""Bytes of the copies of a weight that are read in turn, several times an L2 cache."""
CALLS = 8
REPEATS = 5
REPEAT_S = 0.004
COMPARED = 64
"""Rows of the product that are compared with float64."""
LIMIT_S = 60.0
"""Seconds that a kernel has for all its shapes."""

Tensors = tuple[torch.Tensor, ...]


def shapes(size: str) -> dict[str, tuple[int, int]]:
    """Output and input channels of the linear layers in a decoder layer, as vLLM fuses them."""
    row = dict(zip(SIZES, QWEN25[size.upper()], strict=True))
    hidden, width, inner = row["hidden"], row["heads"] * row["head_dim"], row["intermediate"]
    return {
        "qkv": (width + 2 * row["kv_heads"] * row["head_dim"], hidden),
        "o": (hidden, width),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def layers(size: str) -> int:
    """Number of decoder layers."""
    return int(dict(zip(SIZES, QWEN25[size.upper()], strict=True))["layers"])


def doubled(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What 8-bit codes [R, K] with a scale for each row stand for, in float64."""
    return codes.double() * scales.double().view(-1, 1)


@dataclass(frozen=True)
class Kernel:
    """A way to compute x Wᵀ for a bf16 weight [N, K] and bf16 inputs [M, K].

    `quantize` makes rows and scales of the weight, `repack` what the kernel reads of them; `take` prepares the input,
    and `multiply` does the rest. `held` and `given` are the operands in float64, in the kernel's basis.
    """

    quantize: Callable[[torch.Tensor], Tensors]
    multiply: Callable[[Tensors, Tensors], torch.Tensor]
    held: Callable[[Tensors], torch.Tensor]
    repack: Callable[[Tensors], Tensors] = lambda rows: rows
    take: Callable[[torch.Tensor], Tensors] = lambda x: (x,)
    given: Callable[[Tensors], torch.Tensor] = lambda taken: taken[0].double()


def _plain_int8(values: torch.Tensor) -> Tensors:
    codes = torch.empty_like(values, dtype=torch.int8)
    scales = torch.empty(values.shape[0], 1, dtype=torch.float32, device=values.device)
    torch.ops._C.dynamic_scaled_int8_quant(codes, values, scales, None)
    return codes, scales


def _block(values: torch.Tensor) -> int:
    return largest_block([values.shape[-1]])


def _rotated_rows(weight: torch.Tensor) -> Tensors:
    from flashrl_cli.plugins.rotation import quantize_rows

    codes = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    quantize_rows(weight, codes, scales, _block(weight), 1 / _block(weight))
    return codes, scales


def _rotated(x: torch.Tensor) -> Tensors:
    import flashrl_cli.plugins.rotation  # noqa: F401 - registers the operator

    found: Tensors = torch.ops.flashrl.rotate_and_quantize(x, _block(x))
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_in_passes(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    width: tl.tensor,
    block: tl.constexpr,
    parts: tl.constexpr,
) -> None:
    """Rotate and quantize one row of `width` elements, `parts` blocks at a time, twice."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    common = column[:, None] & column[None, :]
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    signs = (1 - 2 * (common & 1)).to(values.dtype.element_ty)
    place = tl.arange(0, parts)[:, None] * block + column[None, :]
    largest = tl.full((parts,), 1.27e-6, dtype=tl.float32)
    for start in range(0, width, parts * block):
        found = tl.load(values + row * width + start + place, mask=start + place < width, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(tl.dot(found, signs)), axis=1))
    most = tl.max(largest, axis=0)
    for start in range(0, width, parts * block):
        inside = start + place < width
        found = tl.load(values + row * width + start + place, mask=inside, other=0.0)
        nearest = (tl.dot(found, signs) * (127.0 / most) + 12582912.0) - 12582912.0
        tl.store(codes + row * width + start + place, nearest.to(tl.int8), mask=inside)
    tl.store(scales + row, most / 127.0)


@dataclass(frozen=True)
class Pieces:
    """A configuration of the kernel above: blocks of a piece, and warps."""

    parts: int
    warps: int


PIECES = [Pieces(16, 4), Pieces(32, 4), Pieces(32, 8), Pieces(64, 8)]


def rotated_in_passes(x: torch.Tensor, pieces: Pieces, block: int) -> Tensors:
    """INT8 codes [M, K] and float32 scales [M, 1] of the rows of a 16-bit x, rotated by blocks."""
    codes = torch.empty_like(x, dtype=torch.int8)
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    _rotate_in_passes[(x.shape[0],)](
        x, codes, scales, x.shape[1], block, pieces.parts, num_warps=pieces.warps, num_stages=2
    )
    return codes, scales


def _fp8(values: torch.Tensor) -> Tensors:
    from vllm import _custom_ops as ops

    found: Tensors = ops.scaled_fp8_quant(values, use_per_token_if_dynamic=True)
    return found


def _cutlass(rows: Tensors, taken: Tensors) -> torch.Tensor:
    from vllm import _custom_ops as ops

    return ops.cutlass_scaled_mm(taken[0], rows[0].t(), taken[1], rows[1], out_dtype=torch.bfloat16)


def rows_for_16_bits(weight: torch.Tensor) -> Tensors:
    """INT8 rows [N, K] and their scales [N, 1] in bf16, which Machete and Marlin read.

    The scale is rounded before the weight is divided by it: rounded afterwards, it would scale the whole channel by up
    to 0.4 %.
    """
    scales = (weight.abs().amax(1, keepdim=True).float() / 127).clamp_min(1e-8).bfloat16()
    codes = (weight.float() / scales.float()).round_().clamp_(-127, 127).to(torch.int8)
    return codes, scales


def gptq(codes: torch.Tensor) -> torch.Tensor:
    """Symmetric INT8 rows [N, K] in GPTQ's packing: int32 [K / 4, N], column-major.

    The lowest byte is the first of four input channels. Each is stored with 128 added to it (vLLM's type uint8b128).
    """
    # adding 128 to a number of 8 bits flips the highest of them
    return (codes.view(torch.uint8) ^ 0x80).view(torch.int32).t()


def _machete_packed(rows: Tensors) -> Tensors:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    packed = ops.machete_prepack_B(gptq(rows[0]), torch.bfloat16, scalar_types.uint8b128, torch.bfloat16)
    return packed, rows[1].t().contiguous()


def _machete(packed: Tensors, taken: Tensors) -> torch.Tensor:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    return ops.machete_mm(
        a=taken[0], b_q=packed[0], b_type=scalar_types.uint8b128, b_group_scales=packed[1], b_group_size=-1
    )


def _marlin_packed(rows: Tensors) -> Tensors:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    codes, scales = rows
    outputs, inputs = codes.shape
    empty = marlin_utils.marlin_make_empty_g_idx(codes.device)
    packed = ops.gptq_marlin_repack(gptq(codes).contiguous(), perm=empty, size_k=inputs, size_n=outputs, num_bits=8)
    permuted = marlin_utils.marlin_permute_scales(scales.t().contiguous(), size_k=inputs, size_n=outputs, group_size=-1)
    return packed, permuted, empty, marlin_utils.marlin_make_workspace_new(codes.device)


def _marlin(packed: Tensors, taken: Tensors) -> torch.Tensor:
    from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear
    from vllm.scalar_type import scalar_types

    weight, scales, empty, workspace = packed
    return apply_gptq_marlin_linear(
        input=taken[0],
        weight=weight,
        weight_scale=scales,
        weight_zp=empty,
        g_idx=empty,
        g_idx_sort_indices=empty,
        workspace=workspace,
        wtype=scalar_types.uint8b128,
        output_size_per_partition=scales.shape[1],
        input_size_per_partition=taken[0].shape[1],
        is_k_full=True,
    )


def _to_bf16(rows: Tensors, taken: Tensors) -> torch.Tensor:
    return torch.nn.functional.linear(taken[0], rows[0] * rows[1])


@triton.jit  # type: ignore[untyped-decorator]
def _product_of_rows(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    found: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    share: tl.tensor,
    some_tokens: tl.constexpr,
    some_outputs: tl.constexpr,
    some_inputs: tl.constexpr,
) -> None:
    """A tile of W xᵀ for INT8 rows W [outputs, inputs], summed over a share of the inputs.

    The weight is the left operand, which tensor cores of Hopper take from registers, where it was converted to bf16.
    """
    output = tl.program_id(0) * some_outputs + tl.arange(0, some_outputs)
    token = tl.program_id(1) * some_tokens + tl.arange(0, some_tokens)
    part = tl.program_id(2)
    first = part * share
    last = tl.minimum(first + share, inputs)
    inside, present = output < outputs, token < tokens
    total = tl.zeros((some_outputs, some_tokens), dtype=tl.float32)
    for start in range(first, last, some_inputs):
        column = start + tl.arange(0, some_inputs)
        weight = tl.load(codes + output.to(tl.int64)[:, None] * inputs + column[None, :], mask=inside[:, None], other=0)
        given = tl.load(x + token.to(tl.int64)[None, :] * inputs + column[:, None], mask=present[None, :], other=0.0)
        total = tl.dot(weight.to(given.dtype), given, total)
    total = total * tl.load(scales + output, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = (part * tokens + token[None, :]).to(tl.int64) * outputs + output[:, None]
    tl.store(found + place, total.to(found.dtype.element_ty), mask=inside[:, None] & present[None, :])


@dataclass(frozen=True)
class Tile:
    """A configuration of the kernel above; `parts` is the number of shares of the inputs."""

    tokens: int
    outputs: int
    inputs: int
    parts: int
    warps: int
    stages: int


def tiles(tokens: int, outputs: int, inputs: int, processors: int) -> list[Tile]:
    """Configurations that may be the fastest: small batches share the inputs until all processors have work."""
    if tokens > 64:
        return [Tile(128, 128, 64, 1, 8, 3), Tile(256, 128, 64, 1, 8, 3)]
    width = max(16, 1 << (tokens - 1).bit_length())
    found = []
    for rows, columns, warps, stages in ((64, 128, 4, 5), (128, 64, 8, 4)):
        blocks = math.ceil(outputs / rows)
        parts = max(1, min(8, math.ceil(2 * processors / blocks), inputs // columns))
        found += [Tile(width, rows, columns, one, warps, stages) for one in {1, parts}]
    return found


def product_of_rows(rows: Tensors, x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """x [M, K] times INT8 rows [N, K] with scales [N, 1]: bf16 [M, N]."""
    (tokens, inputs), outputs = x.shape, rows[0].shape[0]
    dtype = torch.float32 if tile.parts > 1 else x.dtype
    found = torch.empty(tile.parts, tokens, outputs, dtype=dtype, device=x.device)
    share = math.ceil(inputs / tile.parts / tile.inputs) * tile.inputs
    grid = (math.ceil(outputs / tile.outputs), math.ceil(tokens / tile.tokens), tile.parts)
    _product_of_rows[grid](
        x,
        rows[0],
        rows[1],
        found,
        tokens,
        outputs,
        inputs,
        share,
        tile.tokens,
        tile.outputs,
        tile.inputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return found.sum(0).to(x.dtype) if tile.parts > 1 else found[0]


CHOSEN: dict[str, Tile | Pieces] = {}
"""The fastest configuration by shape, which is found at the first call."""


def _fastest(shape: str, work: Callable[[Any], Any], among: Sequence[Any]) -> Any:
    """The configuration with which `work` is fastest."""
    if shape not in CHOSEN:
        seconds = {}
        for one in among:
            try:
                seconds[one] = min(timed([partial(work, one)] * CALLS, 1))
            except Exception as error:  # noqa: BLE001 - one that does not fit into shared memory
                print(f"{one}: {error}"[:300], file=sys.stderr)
        CHOSEN[shape] = min(seconds, key=lambda one: seconds[one])
    return CHOSEN[shape]


def _rows(rows: Tensors, taken: Tensors) -> torch.Tensor:
    x = taken[0]
    (tokens, inputs), outputs = x.shape, rows[0].shape[0]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    shape = f"{tokens} x {inputs} x {outputs}"
    tile = _fastest(shape, partial(product_of_rows, rows, x), tiles(tokens, outputs, inputs, processors))
    return product_of_rows(rows, x, tile)


def _passes(x: torch.Tensor) -> Tensors:
    def work(pieces: Pieces) -> Tensors:
        return rotated_in_passes(x, pieces, _block(x))

    return work(_fastest(f"{x.shape[0]} x {x.shape[1]}", work, PIECES))


WITH_16_BITS: dict[str, Any] = {"quantize": rows_for_16_bits, "held": lambda rows: doubled(*rows)}
WITH_8_BITS: dict[str, Any] = {
    "multiply": _cutlass,
    "held": lambda rows: doubled(*rows),
    "given": lambda taken: doubled(*taken),
}
KERNELS: dict[str, Kernel] = {
    "bf16": Kernel(
        quantize=lambda weight: (weight,),
        multiply=lambda rows, taken: torch.nn.functional.linear(taken[0], rows[0]),
        held=lambda rows: rows[0].double(),
    ),
    "int8": Kernel(quantize=_plain_int8, take=_plain_int8, **WITH_8_BITS),
    "int8 rotated": Kernel(quantize=_rotated_rows, take=_rotated, **WITH_8_BITS),
    "int8 rotated in passes": Kernel(quantize=_rotated_rows, take=_passes, **WITH_8_BITS),
    "fp8": Kernel(quantize=_fp8, take=_fp8, **WITH_8_BITS),
    "w8a16 machete": Kernel(repack=_machete_packed, multiply=_machete, **WITH_16_BITS),
    "w8a16 marlin": Kernel(repack=_marlin_packed, multiply=_marlin, **WITH_16_BITS),
    "w8a16 to bf16": Kernel(multiply=_to_bf16, **WITH_16_BITS),
    "w8a16 rows": Kernel(multiply=_rows, **WITH_16_BITS),
}
"""In the order in which they are measured: the one that takes longest is last."""
MIXED = {"int8 rotated, qkv bf16": ("int8 rotated", {"qkv": "bf16"})}
"""Sums over layers of two kernels: that of most layers, and those of some."""


def timed(calls: Sequence[Callable[[], Any]], repeats: int = REPEATS) -> list[float]:
    """Microseconds of a call in a CUDA graph of all of them, measured `repeats` times."""
    warming = torch.cuda.Stream()
    warming.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warming):
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.current_stream().wait_stream(warming)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def seconds(replays: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    seconds(1)
    replays = max(1, min(200, math.ceil(REPEAT_S / max(seconds(1), 1e-6))))
    return [round(1e6 * seconds(replays) / replays / len(calls), 3) for _ in range(repeats)]


def once(work: Callable[[], Any]) -> float:
    """Microseconds of work that is done once for a weight: the median of three."""
    found = []
    for _ in range(4):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(1e6 * (time.perf_counter() - begin))
    return round(statistics.median(found[1:]), 1)


def values(rows: int, width: int, seed: int, *, outliers: bool = False) -> torch.Tensor:
    """Random bf16 values, rows of different sizes; with `outliers`, every 512th channel is 20 times as large."""
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = 0.5 + torch.rand(rows, 1, device="cuda", generator=generator)
    found = (sizes * torch.randn(rows, width, device="cuda", generator=generator)).bfloat16()
    if outliers:
        found[:, ::512] *= 20
    return found


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference over that of `exact`."""
    return float((found.double() - exact).norm() / exact.norm())


def measured(kernel: Kernel, outputs: int, inputs: int, batches: list[int]) -> dict[str, Any]:
    """Times and errors of a kernel for a weight [outputs, inputs] and batches of tokens."""
    weight = values(outputs, inputs, 0) * 0.02
    rows = kernel.quantize(weight)
    operands = kernel.repack(rows)
    size = sum(one.numel() * one.element_size() for one in operands)
    copies = [tuple(one.clone() for one in operands) for _ in range(max(1, math.ceil(SPREAD_BYTES / size)))]
    result: dict[str, Any] = {
        "outputs": outputs,
        "inputs": inputs,
        "bytes": size,
        "quantize_us": once(lambda: kernel.quantize(weight)),
        "repack_us": once(lambda: kernel.repack(rows)),
        "batches": {},
    }
    held, exact_weight = kernel.held(rows), weight.double()
    for batch in batches:
        x = values(batch, inputs, 1, outliers=True)
        result["batches"][str(batch)] = _point(kernel, copies, held, exact_weight, x)
    return result


def _point(
    kernel: Kernel, copies: list[Tensors], held: torch.Tensor, weight: torch.Tensor, x: torch.Tensor
) -> dict[str, Any]:
    taken = kernel.take(x)
    chosen = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], COMPARED), device=x.device).long()
    found = kernel.multiply(copies[0], taken)[chosen]
    calls = [partial(_call, kernel, one, x) for one in copies]
    point: dict[str, Any] = {"us": timed(calls * math.ceil(CALLS / len(calls)))}
    if len(taken) > 1:
        point["take_us"] = timed([partial(kernel.take, x)] * CALLS)
    point["kernel_error"] = distance(found, kernel.given(taken)[chosen] @ held.t())
    point["error"] = distance(found, x[chosen].double() @ weight.t())
    return point


def _call(kernel: Kernel, operands: Tensors, x: torch.Tensor) -> torch.Tensor:
    return kernel.multiply(operands, kernel.take(x))


@dataclass(frozen=True)
class Work:
    """What is measured of a kernel: sizes of models, and batches of tokens."""

    sizes: tuple[str, ...]
    batches: list[int]

    def of(self, name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Size, layer and result of each shape."""
        torch.cuda.set_device(0)
        for size in self.sizes:
            for layer, (outputs, inputs) in shapes(size).items():
                yield size, layer, measured(KERNELS[name], outputs, inputs, self.batches)


def _child(name: str, work: Work, out: Connection) -> None:
    """Send each result, and at the end the error if there was one; exit at once, whatever state the GPU is in."""
    try:
        torch.cuda.init()
    except Exception as error:  # noqa: BLE001 - the parent then works without processes
        out.send(("no cuda", repr(error), None))
        os._exit(0)
    try:
        for found in work.of(name):
            out.send(found)
        out.send(("done", {shape: dataclasses.asdict(one) for shape, one in CHOSEN.items()}, None))
    except Exception as error:  # noqa: BLE001 - any failure of a kernel is a result
        out.send(("error", f"{type(error).__name__}: {error}"[:2000], None))
    os._exit(0)


class NoFork(Exception):
    """CUDA cannot be used in a forked process."""


def forked(name: str, work: Work, limit: float) -> dict[str, Any]:
    """What a kernel gave in a process of its own, with `error` if it failed or took longer than `limit` seconds."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, work, theirs))
    process.start()
    theirs.close()
    found: dict[str, Any] = {}
    deadline = time.monotonic() + limit
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            kind, what, result = ours.recv()
            if kind == "no cuda":
                raise NoFork(what)
            if kind == "done":
                return found | ({"chosen": what} if what else {})
            if kind == "error":
                return found | {"error": what}
            found.setdefault(kind, {})[what] = result
        return found | {"error": f"took longer than {limit:.0f} s"}
    except EOFError:
        process.join()
        return found | {"error": f"its process ended with {process.exitcode}"}
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def in_this_process(name: str, work: Work) -> dict[str, Any]:
    """What a kernel gave, with `error` if it failed."""
    found: dict[str, Any] = {}
    try:
        for size, layer, result in work.of(name):
            found.setdefault(size, {})[layer] = result
    except Exception as error:  # noqa: BLE001 - any failure of a kernel is a result
        found["error"] = f"{type(error).__name__}: {error}"[:2000]
    return found


def totals(kernels: dict[str, Any], work: Work) -> dict[str, Any]:
    """Milliseconds of all linear layers of a model by size, batch and kernel, where all of them were measured."""
    found: dict[str, Any] = {}
    ways = {**{name: (name, {}) for name in kernels}, **MIXED}
    for size in work.sizes:
        for batch in map(str, work.batches):
            row = found.setdefault(size, {}).setdefault(batch, {})
            for way, (usual, others) in ways.items():
                parts = [kernels.get(others.get(layer, usual), {}).get(size, {}).get(layer) for layer in shapes(size)]
                if all(parts):
                    one = sum(statistics.median(part["batches"][batch]["us"]) for part in parts if part)
                    row[way] = round(layers(size) * one / 1000, 3)
    return found


def table(found: dict[str, Any]) -> Iterator[str]:
    """Lines with milliseconds of the linear layers in a step, and their ratio to `int8`."""
    for size, by_batch in found.items():
        for batch, row in by_batch.items():
            base = row.get("int8")
            cells = (f"{name} {ms:.2f}" + (f" ({ms / base:.2f})" if base else "") for name, ms in row.items())
            yield f"{size}, {batch} tokens, ms: " + ", ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--sizes", default="7b,32b")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--budget", type=float, default=110.0, help="seconds after which no further kernel begins")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    began = time.monotonic()
    import vllm
    from vllm import _custom_ops  # noqa: F401 - imported once, for all forked processes

    work = Work(tuple(arguments.sizes.split(",")), [int(one) for one in arguments.rows.split(",")])
    together = torch.cuda.is_initialized()
    document: dict[str, Any] = {
        "command": "python -m benchmarks.linear_layers " + " ".join(Path(word).name for word in sys.argv[1:]),
        "versions": {"vllm": vllm.__version__, "torch": str(torch.__version__)},
        "forked": not together,
        "kernels": {},
    }
    for name in arguments.kernels.split(","):
        left = arguments.budget - (time.monotonic() - began)
        started = time.monotonic()
        if left <= 0:
            result: dict[str, Any] = {"error": "left out, the budget has no room for it"}
        elif together:
            result = in_this_process(name, work)
        else:
            try:
                result = forked(name, work, min(LIMIT_S, left))
            except NoFork as error:
                print(f"without processes of their own: {error}", file=sys.stderr)
                together, document["forked"] = True, False
                result = in_this_process(name, work)
        document["kernels"][name] = {"seconds": round(time.monotonic() - started, 1), **result}
        document["ms"] = totals(document["kernels"], work)
        document["seconds"] = round(time.monotonic() - began, 1)
        files.write_json(arguments.out, document)
        print(f"{name}: {result.get('error', 'measured')}, {document['seconds']} s so far", flush=True)
    document["device"] = torch.cuda.get_device_name(0)
    files.write_json(arguments.out, document)
    print("\n".join(table(document["ms"])))


if __name__ == "__main__":
    main()

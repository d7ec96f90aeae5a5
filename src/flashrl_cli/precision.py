"""The table of rollout precisions: everything that depends on a run's precision is read from here.

To add a precision, add a row, its name in `PrecisionName` (and in `RefittedName` if flashrl's weight update brings its
weights), and its linear method in plugins/linear.py. The module uses the standard library only, because the plugins
import it in every worker, and the command line for `--help`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PrecisionName = Literal["bf16", "fp8", "fp8-block", "int8"]
"""Values of `rollout.precision`."""
RefittedName = Literal["bf16", "int8", "fp8"]
"""Precisions of engines that read their weights from disk: `eval` and the reload test of `doctor`."""
CacheName = Literal["fp8", "int8"]
"""Values of `rollout.kv_cache` besides `auto`."""
Option = Literal["kv8", "head32", "smooth", "mix"]
"""Options that a run may combine with its precision: a KV cache in 8 bits, float32 logits, a smoothing profile, or some
replicas in bf16.
"""
WITH_ALL: frozenset[Option] = frozenset({"kv8", "head32", "smooth", "mix"})


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Compute capabilities of the NVIDIA GPUs that have a kernel: from `least` up to, but not including, `below`."""

    least: tuple[int, int]
    below: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The arithmetic of the linear layers in a rollout engine."""

    name: PrecisionName
    number_format: str
    """Number format of the weights, as messages name it."""
    method: str | None = None
    """vLLM's `quantization`: the method that plugins/linear.py registers, whose weights arrive through flashrl's weight
    update.
    """
    verl: str | None = None
    """verl's name for the precision if verl's code quantizes and loads its weights."""
    vllm_config: Mapping[str, Any] = field(default_factory=dict)
    """The `quantization_config` that verl passes to vLLM for it, without `ignored_layers`."""
    weight_bytes: float
    """Bytes per weight of a quantized layer, without the float32 scales."""
    block: int | None = None
    """Side of a square block of weights that share a scale. None means one scale per row (output channel), or no
    scales.
    """
    experts: bool
    """Whether the experts of a mixture of experts are quantized too; otherwise they stay in bf16."""
    mlp_bytes: int
    """Bytes per token and unit of MLP width for the outputs of the gate and up projections and their product: 2 bytes
    each, plus the product's 8-bit copy.
    """
    asleep_bytes: int
    """Bytes that a sleeping engine keeps besides its context and CUDA graphs: the largest measured value."""
    gpus: Capabilities
    cpu: bool
    """Whether vLLM has a kernel for a CPU."""
    rotates: bool = False
    """Whether the input of each layer is rotated by blocks before it is rounded (`rollout.rotation`).

    A rotation spreads outliers, which set the step of a row of integers. A floating-point format has a finer step for
    smaller values, and loses by it: KL 0.0276 nats a token became 0.0426 (docs/rotation.md).
    """
    instead: PrecisionName
    """The precision to use instead on GPUs without its kernel."""
    sibling: PrecisionName
    """The most similar quantized precision, to use for an option that this one does not support."""
    goes_with: frozenset[Option] = WITH_ALL

    @property
    def quantized(self) -> bool:
        """Whether weights are rounded to fewer than 16 bits."""
        return self.weight_bytes < 2


BF16 = Precision(
    name="bf16",
    number_format="BF16",
    weight_bytes=2,
    experts=False,
    mlp_bytes=6,
    asleep_bytes=600 << 20,  # 0.5 to 0.6 GiB
    gpus=Capabilities((8, 0)),
    cpu=True,
    instead="int8",
    sibling="int8",
    goes_with=frozenset({"kv8", "head32"}),
)
INT8 = Precision(
    name="int8",
    number_format="INT8",
    method="flashrl_int8",
    weight_bytes=1,
    experts=False,
    mlp_bytes=7,
    asleep_bytes=1000 << 20,  # 0.4 to 1.0 GiB
    # INT8 tensor cores begin with Turing; vLLM's CUTLASS kernels end with Hopper (docs/features/quantization/int8.md of
    # vLLM)
    gpus=Capabilities((7, 5), below=(10, 0)),
    cpu=True,  # oneDNN
    rotates=True,
    instead="fp8",
    sibling="int8",
)
FP8 = Precision(
    name="fp8",
    number_format="FP8",
    method="flashrl_fp8",
    weight_bytes=1,
    experts=False,
    mlp_bytes=7,
    asleep_bytes=1950 << 20,  # 1.5 to 1.9 GiB
    gpus=Capabilities((8, 9)),  # FP8 tensor cores begin with Ada
    cpu=False,
    instead="int8",
    sibling="fp8",
)
FP8_BLOCK = Precision(
    name="fp8-block",
    number_format="FP8",
    verl="fp8",
    # verl/workers/rollout/vllm_rollout/vllm_async_server.py:1245
    vllm_config={
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
    weight_bytes=1,
    block=128,
    experts=True,
    mlp_bytes=5,  # the product is held only in its 8-bit copy
    asleep_bytes=1950 << 20,  # 1.5 to 1.9 GiB
    gpus=Capabilities((8, 9)),
    cpu=False,
    instead="int8",
    sibling="fp8",
    goes_with=frozenset(),  # all options need flashrl's weight update, which applies and proves them
)
PRECISIONS: dict[str, Precision] = {row.name: row for row in (BF16, INT8, FP8, FP8_BLOCK)}
"""All precisions, in the order in which they are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """The arithmetic of a KV cache in 8 bits."""

    name: CacheName
    suffix: str
    """Its name in that of a variant or of a run: `int8+kv8`."""
    vllm: str
    """vLLM's `cache_dtype`."""
    bounded: bool
    """Whether its scales follow from a bound that is known for some families of models (plugins/kv_scales.py);
    otherwise vLLM computes a scale for each token and head.
    """
    scale_bytes: int
    """Bytes of the scale that the keys, or the values, of a token and head have."""
    gpus: Capabilities
    cpu: bool


KV_CACHES: dict[str, KvCache] = {
    row.name: row
    for row in (
        # on other GPUs vLLM takes FlashInfer (platforms/cuda.py:142 in 0.24), which does not read new scales
        KvCache(
            name="fp8",
            suffix="kv8",
            vllm="fp8",
            bounded=True,
            scale_bytes=0,
            gpus=Capabilities((9, 0), below=(10, 0)),
            cpu=True,
        ),
        # of vLLM's attention only Triton's knows it (v1/attention/backends/triton_attn.py:261 in 0.24)
        KvCache(
            name="int8",
            suffix="kvint8",
            vllm="int8_per_token_head",
            bounded=False,
            scale_bytes=4,
            gpus=Capabilities((8, 0)),
            cpu=False,
        ),
    )
}
BY_CACHE_DTYPE = {row.vllm: row.name for row in KV_CACHES.values()} | {"fp8_e4m3": "fp8"}
"""The name of a cache by vLLM's `cache_dtype`."""

METAVAR = "|".join(PRECISIONS)
REFITTED = tuple(name for name, row in PRECISIONS.items() if row.verl is None)
SMOOTHED = tuple(name for name, row in PRECISIONS.items() if "smooth" in row.goes_with)
ON_CPU = tuple(name for name, row in PRECISIONS.items() if row.cpu)
BY_METHOD = tuple(name for name, row in PRECISIONS.items() if row.method)
"""Precisions that use flashrl's own quantization methods."""
ROTATED = tuple(name for name, row in PRECISIONS.items() if row.rotates)
WITH_EXPERTS = tuple(name for name, row in PRECISIONS.items() if row.experts)


def method(name: str) -> str | None:
    """vLLM's `quantization` for a precision that flashrl's weight update brings; None for bf16 and for verl's own."""
    return PRECISIONS[name].method


BLOCKS = (16, 32, 64, 128)
"""Sizes of a rotation's blocks: powers of two, for which a Hadamard matrix exists by Sylvester's construction."""
LARGEST_BLOCK = 128
"""The largest block of `auto`."""


def largest_block(widths: Iterable[int]) -> int:
    """The largest block up to LARGEST_BLOCK that divides each of `widths`; 0 if none does."""
    common = math.gcd(*widths)
    return max((block for block in BLOCKS if block <= LARGEST_BLOCK and common % block == 0), default=0)


def joined(names: Iterable[str], word: str) -> str:
    """Names joined as in a sentence: `bf16, int8 or fp8` with the word `or`."""
    *others, last = names
    return f"{', '.join(others)} {word} {last}" if others else last

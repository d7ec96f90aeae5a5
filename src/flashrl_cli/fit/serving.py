"""What one vLLM engine holds on a GPU: weights at the rollout's precision, working memory, and the KV cache in what is left.

vLLM takes `gpu_memory_utilization` of the GPU, subtracts the weights and the peak of a profiling pass, and fills the rest with KV blocks
(vllm/v1/worker/gpu_worker.py, determine_available_memory).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli.fit.shape import parameters

if TYPE_CHECKING:
    from flashrl_cli.fit.shape import ModelShape
    from flashrl_cli.verl.memory_keys import RolloutSettings, TrainerSettings

BLOCK = 16
"""Tokens of a KV block."""
FP8_BLOCK = 128 * 128
"""Weights that share one float32 scale under verl's fp8-block (verl/utils/vllm/vllm_fp8_utils.py)."""
OUTSIDE_TORCH = 200 << 20
"""Bytes of libraries that vLLM counts against its budget: 182 and 194 MiB measured for bf16 on one GPU."""
GRAPHS, GRAPHS_OF_LAYER = 120 << 20, 11 << 20
"""Bytes of CUDA graphs: 348 to 471 MiB measured for 28 layers, 752 to 881 for 64 (51 sizes of batch, the default)."""
SAMPLER_BYTES = 18
"""Bytes a logit of the warm-up of the sampler: 18.3 measured with 1,024 sequences and a vocabulary of 151,936."""
MLP_BYTES = {"bf16": 6, "int8": 7, "fp8": 7, "fp8-block": 5}
"""Bytes a token for each unit of the MLP's width: gate and up projection, their product.

int8 and fp8 add an 8-bit copy of the product, fp8-block has only that.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One GPU's share of an engine, in bytes, and the tokens that its KV cache holds."""

    budget: int
    weights: int
    working: int
    kv: int
    kv_bytes_per_token: int
    kv_tokens: int
    wanted_tokens: int
    sequence_tokens: int
    """Longest sequence."""

    @property
    def starts(self) -> bool:
        """Whether the KV cache holds one sequence of the longest length; vLLM refuses to start otherwise."""
        return self.kv_tokens >= self.sequence_tokens


def engine(shape: ModelShape, settings: TrainerSettings, gpu_bytes: int) -> Engine:
    """The engine of a rollout on a GPU of `gpu_bytes`."""
    rollout = settings.rollout
    held = weights(shape, rollout.precision, rollout.tensor_parallel)
    busy = working(shape, rollout)
    budget = round(rollout.gpu_memory_utilization * gpu_bytes)
    per_token = kv_bytes(shape, rollout)
    kv = max(0, budget - held - busy)
    engines = max(1, settings.world // rollout.tensor_parallel)
    at_once = min(rollout.max_num_seqs, -(-settings.train_batch * settings.n // engines))
    return Engine(
        budget=budget,
        weights=held,
        working=busy,
        kv=kv,
        kv_bytes_per_token=per_token,
        kv_tokens=kv // (per_token * BLOCK) * BLOCK,
        wanted_tokens=at_once * settings.length,
        sequence_tokens=rollout.max_model_len,
    )


def weights(shape: ModelShape, precision: str, tensor_parallel: int = 1) -> int:
    """Bytes of the weights on one GPU: bf16 2 B; 8-bit linear layers 1 B and their scales.

    A float32 scale for each output channel under int8 and fp8, for each block under fp8-block. Embeddings, head, norms and, but under
    fp8-block, experts stay bf16 (plugins/online_linear.py).
    """
    counts = parameters(shape)
    plain = counts.embeddings + counts.head + counts.other
    size: float = 2 * counts.total
    if precision in {"int8", "fp8"}:
        size = 2 * (plain + counts.experts) + counts.linear + 4 * output_channels(shape)
    elif precision == "fp8-block":
        size = 2 * plain + (counts.linear + counts.experts) * (1 + 4 / FP8_BLOCK)
    return round(size / tensor_parallel)


def output_channels(shape: ModelShape) -> int:
    """Outputs of all linear layers, each of which has a scale under int8 and fp8."""
    dense = shape.layers - shape.expert_layers
    attention = shape.query_size + 2 * shape.kv_size + shape.hidden
    shared = shape.expert_layers * bool(shape.shared_intermediate) * (2 * shape.shared_intermediate + shape.hidden)
    return shape.layers * attention + dense * (2 * shape.intermediate + shape.hidden) + shared


def kv_bytes(shape: ModelShape, rollout: RolloutSettings) -> int:
    """Bytes of keys and values a token on one GPU; heads are repeated where there are more GPUs than heads."""
    heads = max(1, shape.kv_heads // rollout.tensor_parallel)
    return 2 * shape.layers * heads * shape.head_dim * rollout.kv_bytes


def working(shape: ModelShape, rollout: RolloutSettings) -> int:
    """Bytes that vLLM sets aside beside weights and cache: the larger of a full batch in an MLP and of the sampler, and CUDA graphs."""
    width = shape.intermediate if not shape.experts else shape.experts_per_token * shape.expert_intermediate
    token = MLP_BYTES[rollout.precision] * width / rollout.tensor_parallel + 8 * shape.hidden
    sampler = rollout.max_num_seqs * shape.vocab * SAMPLER_BYTES
    return round(max(rollout.max_num_batched_tokens * token, sampler)) + OUTSIDE_TORCH + graphs(shape, rollout)


def graphs(shape: ModelShape, rollout: RolloutSettings) -> int:
    """Bytes of the engine's CUDA graphs, which it keeps while it sleeps."""
    return 0 if rollout.eager else GRAPHS + shape.layers * GRAPHS_OF_LAYER

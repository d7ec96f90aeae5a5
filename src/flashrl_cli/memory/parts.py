"""The parts of one GPU's memory, each with its formula: trainer states, trainer passes, the rollout engine.

- States are those of ZeRO stage 3 (Rajbhandari et al., 2019, arXiv 1910.02054, section 5.3) in verl's precisions:
  parameters, gradients and Adam's two moments in float32, working copies in bfloat16. FSDP shards them, and gathers
  layers while they compute.
- Passes are activations, logits and gradients of a forward (and backward) pass. Activations are counted per token from
  the tensors that autograd saves in a decoder layer of Transformers, in the manner of Korthikanti et al., 2022 (arXiv
  2205.05198, section 4). Attention is assumed to be fused, so nothing grows with the square of the length.
- Engine: vLLM takes `gpu_memory_utilization` of the GPU, subtracts weights and the peak of a profiling pass, and fills
  the rest with KV blocks (vllm/v1/worker/gpu_worker.py, determine_available_memory).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli.contract import LOG_PROBS_CHUNK
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.text import counted
from flashrl_cli.weights.shape import parameters

if TYPE_CHECKING:
    from flashrl_cli.verl.config import Batch, EngineSettings, RolloutSettings, TrainerSettings
    from flashrl_cli.weights.shape import ModelShape

MARGIN = 0.1
"""Fraction by which an item may exceed its estimate."""
FRAGMENTS = 0.3
"""Fraction by which memory that a pass allocates and frees may exceed its estimate: the caching allocator held 30 to 33
% more, see docs/memory-model.md.
"""


@dataclass(frozen=True, slots=True)
class Item:
    """An amount of memory on one GPU in bytes.

    `margin` is the fraction that may come on top; it is 0 for a budget that the engine does not exceed.
    """

    name: str
    bytes: int
    formula: str
    margin: float = MARGIN


def item(name: str, size: float, formula: str, *, margin: float = MARGIN) -> Item:
    """An item of `size` bytes, rounded to an integer."""
    return Item(name, round(size), formula, margin)


def _passing(name: str, size: float, formula: str) -> Item:
    """An item that is allocated and freed in every pass, with FRAGMENTS as its margin."""
    return item(name, size, formula, margin=FRAGMENTS)


def total(items: tuple[Item, ...]) -> int:
    """Sum of all items in bytes."""
    return sum(part.bytes for part in items)


def _size(part: Item) -> int:
    return part.bytes


LAYERS_GATHERED = {"fsdp": 2, "fsdp2": 3}
"""Gathered bfloat16 layers at a time: the one that computes, the prefetched one, and FSDP2's copy-out buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model in one FSDP engine: parameter counts of its units, and how many GPUs share it."""

    total: int
    trained: int
    layer: int
    """Parameters of the largest layer."""
    embeddings: int
    head: int
    """Parameters of the head; 0 for a tied head or a critic's."""
    shards: int
    engine: EngineSettings

    @property
    def params(self) -> float:
        """Bytes of this GPU's shard of the parameters."""
        return self.total * self.engine.model_bytes / self.shards

    @property
    def grads(self) -> float:
        """Bytes of this GPU's shard of the gradients."""
        return self.trained * self.engine.model_bytes / self.shards

    @property
    def adam(self) -> float:
        """Bytes of this GPU's shard of the optimizer's state."""
        return self.trained * self.engine.adam_bytes / self.shards

    @property
    def frozen(self) -> bool:
        """Whether only an adapter is trained."""
        return self.trained < self.total

    @property
    def root(self) -> int:
        """Parameters outside the layers, which are one unit under FSDP1."""
        return self.embeddings + self.head


def model_of(shape: ModelShape, engine: EngineSettings, world: int, *, critic: bool = False) -> Model:
    """A policy, or a critic, whose head has one output (verl/utils/model.py, load_valuehead_model)."""
    counts = parameters(shape)
    head = 0 if critic else counts.head
    adapter = adapter_parameters(shape, engine.lora_rank, engine.lora_targets)
    total = counts.total - counts.head + head + adapter
    size = engine.fsdp_size
    return Model(
        total=total,
        trained=adapter or total,
        layer=(counts.linear + counts.experts + counts.other) // shape.layers,
        embeddings=counts.embeddings,
        head=head,
        shards=size if 0 < size < world else world,
        engine=engine,
    )


def adapter_parameters(shape: ModelShape, rank: int, targets: tuple[str, ...] | None) -> int:
    """Parameters of a LoRA adapter, rank * (inputs + outputs) per matrix (Hu et al., 2021); packed experts get none."""
    q, kv, hidden, wide = shape.query_size, shape.kv_size, shape.hidden, shape.intermediate
    attention = {"q_proj": hidden + q, "k_proj": hidden + kv, "v_proj": hidden + kv, "o_proj": q + hidden}
    mlp = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + wide)
    dense = shape.layers - shape.expert_layers
    chosen = {name for name in {*attention, *mlp} if targets is None or name in targets}
    sides = shape.layers * sum(size for name, size in attention.items() if name in chosen)
    return rank * (sides + dense * sum(size for name, size in mlp.items() if name in chosen))


def resident(model: Model, role: str, *, training: bool = False, loaded: bool = False) -> tuple[Item, ...]:
    """States of a model that are on the GPU.

    These are all states while it trains, its parameters if it is `loaded` for a pass, and otherwise the states that are
    not offloaded. verl loads parameters and optimizer at the start of a phase and offloads them again at its end
    (verl/workers/engine/base.py:314).
    """
    engine = model.engine
    if engine.offload_policy:
        return ()
    per = f"/ {counted(model.shards, 'GPU')}"
    found = []
    if training or loaded or not engine.param_offload:
        found.append(
            item(f"{role} parameters", model.params, f"{model.total / 1e9:.2f} G x {engine.model_bytes} B {per}")
        )
    if training or not engine.optimizer_offload:
        found.append(item(f"{role} Adam", model.adam, f"{model.trained / 1e9:.2f} G x {engine.adam_bytes} B {per}"))
    if training:
        found.append(
            item(f"{role} gradients", model.grads, f"{model.trained / 1e9:.2f} G x {engine.model_bytes} B {per}")
        )
    return tuple(found)


def gathered(model: Model) -> int:
    """Bytes of the unsharded copies while the model computes.

    FSDP1 keeps the unit of embeddings and head from the forward pass to the end of the backward pass. FSDP2, as verl
    wraps it, gathers each when it is needed (verl/utils/fsdp_utils.py:549). Without resharding the complete model stays
    gathered.
    """
    engine = model.engine
    if not engine.reshard:
        return model.total * engine.compute_bytes
    layers = LAYERS_GATHERED[engine.strategy] * model.layer
    outside = model.root if engine.strategy == "fsdp" or not model.head else max(model.embeddings, model.head)
    return (layers + outside) * engine.compute_bytes


def unsharded_gradients(model: Model, parameters: int) -> int:
    """Bytes needed to reduce the gradients of a unit: in the working precision, then in that of the reduction."""
    if model.frozen:
        return 0
    return parameters * (model.engine.compute_bytes + model.engine.reduce_bytes)


def kept_gradients(model: Model) -> int:
    """Bytes of unsharded gradients that stay between micro-batches when their synchronization is deferred."""
    engine = model.engine
    if not engine.no_sync:
        return 0
    return model.trained * (engine.compute_bytes if engine.strategy == "fsdp" else engine.reduce_bytes)


FUSED_CHUNK = 512
"""Tokens whose logits verl's fused head holds at a time (verl/utils/experimental/torch_functional.py:98)."""
FUSED_BACKWARD, FUSED_FORWARD = 26, 20
"""Bytes per logit of such a chunk: float32 logits, probabilities, one-hot vectors and their products."""


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens of one GPU in one pass: those that are `computed`, including padding, and the `real` ones among them."""

    computed: int
    real: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.computed:,} tokens{self.note}"


def tokens(batch: Batch, settings: TrainerSettings, engine: EngineSettings, prompts: int) -> Load:
    """Load of one pass: the token budget or the micro-batch at full length, but at most all tokens there are.

    With padding, it is the size to which the budget can grow.
    """
    share = engine.sequence_parallel
    sequences = max(1, prompts * settings.n * share // settings.world)
    if batch.tokens and not engine.remove_padding:
        return _padded(batch.tokens, sequences, settings)
    longest = settings.length / share
    wanted = batch.tokens or (batch.sequences or 1) * longest
    count = round(max(min(wanted, sequences * longest), longest))
    return Load(count, count)


def _padded(budget: int, sequences: int, settings: TrainerSettings) -> Load:
    """Load of a token budget without remove-padding, which padding can exceed.

    It grows most for a micro-batch of short sequences and one long one. Sequences are packed by their real tokens into
    as few micro-batches as the budget allows, balanced (verl/utils/seqlen_balancing.py:400), and each is padded to its
    longest sequence (verl/workers/engine/fsdp/transformer_impl.py:1281), assumed to be the longest of all.
    """
    real = sequences * settings.length * settings.mean_share
    batches = min(sequences, math.ceil(real / budget))
    computed = round(sequences / batches * settings.length)
    note = f" (padded; mean length {settings.mean_share:.2g} of the longest)" if settings.mean_share < 1 else ""
    return Load(computed, round(real / batches), note)


def training(shape: ModelShape, model: Model, settings: TrainerSettings, role: str) -> tuple[Item, ...]:
    """States and passes of an update, at the moment of its peak.

    The peak is at the logits, a layer's backward pass, the last reduction of gradients, or Adam's step.
    """
    engine = model.engine
    load = tokens(engine.train, settings, engine, settings.mini_batch)
    kept = saved(shape, engine, load)
    weights = item("gathered layers", gathered(model), "unsharded working copies of FSDP")
    backward = recomputed(shape, engine, load.computed) + unsharded_gradients(model, model.layer)
    head = 0 if model.frozen else (model.head or (0 if role == "critic" else model.embeddings)) * engine.compute_bytes
    last = model.root if engine.strategy == "fsdp" else max(model.embeddings, model.head)
    reduction = unsharded_gradients(model, last) + last * engine.compute_bytes * (not model.frozen)
    moments: list[tuple[Item, ...]] = [
        (weights, kept, _passing("layer in backward", backward + head, "activations, gradients, the head's gradient")),
        (weights, _passing("last reduction", reduction, "gradients of embeddings and head")),
    ]
    if role != "critic":
        moments.append((weights, kept, train_logits(shape, engine, load, settings.temperature)))
    if not engine.offload_policy:
        step = model.trained * engine.model_bytes / model.shards
        moments.append((item("Adam's step", step, "one temporary of the size of a moment"),))
    highest = max(moments, key=lambda parts: sum(part.bytes for part in parts))
    deferred = kept_gradients(model)
    extra = (item("deferred gradients", deferred, "unsharded between micro-batches"),) if deferred else ()
    return (*resident(model, role, training=True), *extra, *highest)


def inference(
    shape: ModelShape, model: Model, settings: TrainerSettings, batch: Batch, *, logits: bool, entropy: bool
) -> tuple[Item, ...]:
    """Memory of a pass without gradients, excluding the states; `logits` is off for a critic."""
    engine = model.engine
    load = tokens(batch, settings, engine, settings.scored)
    wide = engine.compute_bytes * (3 * mlp_width(shape) + 4 * shape.hidden) + 4 * shape.hidden
    weights = item("gathered layers", gathered(model), "unsharded working copies of FSDP")
    layer = _passing("activations", load.computed * wide, f"{load} x {wide:,} B of one layer")
    if not logits:
        return (weights, layer)
    return (weights, max(layer, infer_logits(shape, engine, load, settings.temperature, entropy=entropy), key=_size))


def layer_activations(shape: ModelShape, bytes_each: int) -> int:
    """Bytes per token that autograd saves in one layer.

    Two norms save a float32 copy of their input and of its product, and their output in the working precision twice;
    attention saves queries, keys, values and output; the gated MLP saves four tensors of its width.
    """
    norms = shape.norms_per_layer * shape.hidden * (4 + 2 * bytes_each)
    attention = bytes_each * (2 * shape.query_size + 2 * shape.kv_size)
    return norms + attention + 4 * bytes_each * mlp_width(shape)


def mlp_width(shape: ModelShape) -> int:
    """Width of the MLP that a token passes through in one layer: the dense MLP, or its selected experts together."""
    if not shape.experts:
        return shape.intermediate
    return shape.experts_per_token * (shape.expert_intermediate + shape.hidden // 2) + shape.shared_intermediate


def saved(shape: ModelShape, engine: EngineSettings, load: Load) -> Item:
    """Activations saved for the backward pass: each layer's input with gradient checkpointing, everything without."""
    each = engine.compute_bytes
    if not engine.checkpointing:
        size = layer_activations(shape, each)
        formula = f"{load} x {shape.layers} layers x {size:,} B"
        return _passing("activations", load.computed * shape.layers * size, formula)
    layers = 2 if engine.activation_offload else shape.layers
    formula = f"{load} x {layers} layers x {shape.hidden} x {each} B"
    return _passing("checkpointed activations", load.computed * layers * shape.hidden * each, formula)


def recomputed(shape: ModelShape, engine: EngineSettings, count: int) -> int:
    """Bytes of one layer in its backward pass: its activations, unless they are already saved, and their gradients."""
    each = engine.compute_bytes
    own = layer_activations(shape, each) if engine.checkpointing else 0
    return count * (own + each * (3 * mlp_width(shape) + 2 * shape.hidden))


def train_logits(shape: ModelShape, engine: EngineSettings, load: Load, temperature: float) -> Item:
    """Logits of a pass with gradients (verl/workers/engine/fsdp/transformer_impl.py:1332-1545).

    The gradient is written over the logits, or over the copy without padding, and beside them where an entropy needs
    them as well. Padding is put back into the gradient by two tensors of the padded size.
    """
    each = engine.compute_bytes
    if engine.fused_kernels:
        size = min(load.computed, FUSED_CHUNK) * shape.vocab * FUSED_BACKWARD + 2 * shape.vocab * shape.hidden * each
        formula = f"fused: {FUSED_CHUNK} tokens x {shape.vocab:,} x {FUSED_BACKWARD} B + gradient of the head"
        return _passing("logits", size, formula)
    computed = each * (1 + (temperature != 1))
    if engine.flash_attention and engine.train_entropy:
        peak, kept = entropy_bytes(engine)
        real = 0 if engine.remove_padding else each
        return max(_logits(shape, load, computed + peak, 0), _logits(shape, load, computed + kept, real), key=_size)
    if engine.train_entropy:
        return _logits(shape, load, 3 * each, 0, chunked=True)
    computed, real = (computed, 0) if engine.remove_padding else (2 * each, each)
    return _logits(shape, load, computed, real, chunked=not engine.flash_attention)


def infer_logits(shape: ModelShape, engine: EngineSettings, load: Load, temperature: float, *, entropy: bool) -> Item:
    """Logits of a pass without gradients.

    verl computes the entropy together with old log-probs (trainer/ppo/v1/trainer_base.py:1653).
    """
    each = engine.compute_bytes
    if engine.fused_kernels:
        size = min(load.computed, FUSED_CHUNK) * shape.vocab * FUSED_FORWARD
        return _passing("logits", size, f"fused: {FUSED_CHUNK} tokens x {shape.vocab:,} x {FUSED_FORWARD} B")
    computed, real = each * (1 + (temperature != 1)), 0 if engine.remove_padding else each
    packed = _logits(shape, load, computed, real, chunked=not engine.flash_attention)
    if not entropy or not engine.flash_attention:
        return packed
    peak, _ = entropy_bytes(engine)
    if engine.entropy_chunk and engine.remove_padding:
        peak = round(peak * min(1, engine.entropy_chunk / load.computed))
    return max(packed, _logits(shape, load, computed + peak, 0), key=_size)


def entropy_bytes(engine: EngineSettings) -> tuple[int, int]:
    """Bytes per logit for verl's own entropy, besides the logits: at its peak, and those kept for a backward pass.

    Under autocast softmax and logsumexp work in float32 (ATen/autocast_mode.h): probabilities, a cast of the logits and
    their exponentials, 4 B each (verl/utils/torch_functional.py, entropy_from_logits). A compiled entropy is assumed to
    be fused.
    """
    if engine.compiled and engine.remove_padding:
        return 0, engine.compute_bytes
    cast = 4 if engine.compute_bytes < 4 else 0
    return 8 + cast, 4 + cast


def _logits(shape: ModelShape, load: Load, computed: int, real: int, *, chunked: bool = False) -> Item:
    """Logits at `computed` bytes each, `real` bytes more for those that are not padding, and a chunk's temporaries.

    The latter are those of flashrl's log-probs and entropies: two float32 tensors (plugins/log_probs.py).
    """
    if load.real == load.computed:
        computed, real = computed + real, 0
    size = shape.vocab * (load.computed * computed + load.real * real)
    more = f" + {load.real:,} x {shape.vocab:,} x {real} B" if real else ""
    if chunked:
        chunk = min(LOG_PROBS_CHUNK, 4 * load.computed * shape.vocab)
        size += 2 * chunk
        more += f" + 2 x {chunk >> 20} MiB"
    return _passing("logits", size, f"{load} x {shape.vocab:,} x {computed} B{more}")


BLOCK = 16
"""Tokens per KV block."""
OUTSIDE_TORCH = 200 << 20
"""Bytes of libraries that vLLM counts against its budget: 182 and 194 MiB measured for bf16 on one GPU."""
GRAPHS, GRAPHS_OF_LAYER = 120 << 20, 11 << 20
"""Bytes of CUDA graphs: 348 to 471 MiB measured for 28 layers, 752 to 881 for 64 (51 batch sizes, the default)."""
SAMPLER_BYTES = 18
"""Bytes per logit in the sampler's warm-up: 18.3 measured with 1,024 sequences and a vocabulary of 151,936."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One GPU's share of an engine in bytes, and the KV cache's capacity in tokens."""

    budget: int
    weights: int
    working: int
    kv: int
    kv_bytes_per_token: int
    kv_tokens: int
    wanted_tokens: int
    sequence_tokens: int
    """Maximum length of a sequence in tokens."""

    @property
    def starts(self) -> bool:
        """Whether the KV cache holds one sequence of the maximum length; otherwise vLLM refuses to start."""
        return self.kv_tokens >= self.sequence_tokens


def engine(shape: ModelShape, settings: TrainerSettings, gpu_bytes: int) -> Engine:
    """The engine of the rollouts on a GPU of `gpu_bytes`."""
    rollout = settings.rollout
    held = weights(shape, rollout.precision, rollout.tensor_parallel)
    busy = working(shape, rollout)
    budget = round(rollout.gpu_memory_utilization * gpu_bytes)
    per_token = kv_bytes(shape, rollout)
    kv = max(0, budget - held - busy)
    in_flight = math.ceil((1 + settings.prefetch) * settings.train_batch) * settings.n
    at_once = min(rollout.max_num_seqs, -(-in_flight // settings.engines))
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
    """Bytes of the weights on one GPU.

    Quantized layers have 8-bit weights and float32 scales, every other weight takes 2 B. Embeddings, head and norms
    stay in bf16 in every precision, experts in most (plugins/linear.py).
    """
    counts, row = parameters(shape), PRECISIONS[precision]
    if not row.quantized:
        return round(2 * counts.total / tensor_parallel)
    quantized = counts.linear + (counts.experts if row.experts else 0)
    scales = quantized / row.block**2 if row.block else output_channels(shape)
    size = row.weight_bytes * quantized + 4 * scales + 2 * (counts.total - quantized)
    return round(size / tensor_parallel)


def output_channels(shape: ModelShape) -> int:
    """Total number of outputs of all linear layers, each of which has one scale under int8 and fp8."""
    dense = shape.layers - shape.expert_layers
    attention = shape.query_size + 2 * shape.kv_size + shape.hidden
    shared = shape.expert_layers * bool(shape.shared_intermediate) * (2 * shape.shared_intermediate + shape.hidden)
    return shape.layers * attention + dense * (2 * shape.intermediate + shape.hidden) + shared


def kv_bytes(shape: ModelShape, rollout: RolloutSettings) -> int:
    """Bytes of keys and values per token on one GPU; heads are replicated if there are more GPUs than heads."""
    heads = max(1, shape.kv_heads // rollout.tensor_parallel)
    return 2 * shape.layers * heads * (shape.head_dim * rollout.kv_bytes + rollout.kv_scale_bytes)


def working(shape: ModelShape, rollout: RolloutSettings) -> int:
    """Bytes that vLLM reserves besides weights and KV cache.

    They are CUDA graphs and the larger of two peaks: a full batch in an MLP, or the sampler.
    """
    width = shape.intermediate if not shape.experts else shape.experts_per_token * shape.expert_intermediate
    token = PRECISIONS[rollout.precision].mlp_bytes * width / rollout.tensor_parallel + 8 * shape.hidden
    sampler = rollout.max_num_seqs * shape.vocab * SAMPLER_BYTES
    return round(max(rollout.max_num_batched_tokens * token, sampler)) + OUTSIDE_TORCH + graphs(shape, rollout)


def graphs(shape: ModelShape, rollout: RolloutSettings) -> int:
    """Bytes of the engine's CUDA graphs, which it keeps while it sleeps."""
    return 0 if rollout.eager else GRAPHS + shape.layers * GRAPHS_OF_LAYER

"""What one forward (and backward) pass of verl's trainer holds on a GPU: activations, logits, and the gradients on their way.

Activations are counted per token from what autograd saves in a decoder layer of Transformers, in the manner of Korthikanti et al.,
2022 (arXiv 2205.05198, section 4); attention is taken to be fused, so nothing grows with the square of the length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli.fit.items import FRAGMENTS, Item, item
from flashrl_cli.fit.states import Model, gathered, kept_gradients, resident, unsharded_gradients

if TYPE_CHECKING:
    from flashrl_cli.fit.shape import ModelShape
    from flashrl_cli.verl.memory_keys import Batch, EngineSettings, TrainerSettings

FUSED_CHUNK = 512
"""Tokens whose logits verl's fused head holds at once (verl/utils/experimental/torch_functional.py:98)."""
FUSED_BACKWARD, FUSED_FORWARD = 26, 20
"""Bytes a logit of such a chunk: float32 logits, probabilities, one-hot and their products."""


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens of one GPU in one pass: what is `computed`, padding included, and how many of them are `real`."""

    computed: int
    real: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.computed:,} tokens{self.note}"


def tokens(batch: Batch, settings: TrainerSettings, engine: EngineSettings, prompts: int) -> Load:
    """The budget, or the micro-batch at full length, but no more than there are; with padding, what the budget grows to."""
    share = engine.sequence_parallel
    sequences = max(1, prompts * settings.n * share // settings.world)
    if batch.tokens and not engine.remove_padding:
        return _padded(batch.tokens, sequences, settings)
    longest = settings.length / share
    wanted = batch.tokens or (batch.sequences or 1) * longest
    count = round(max(min(wanted, sequences * longest), longest))
    return Load(count, count)


def _padded(budget: int, sequences: int, settings: TrainerSettings) -> Load:
    """Load of a budget without remove-padding, which can exceed it: a micro-batch of short sequences and one long one grows most.

    Sequences are packed by their real tokens into as few micro-batches as the budget allows, balanced (verl/utils/seqlen_balancing.py:400),
    and each is padded to its longest (verl/workers/engine/fsdp/transformer_impl.py:1281), taken to be the longest of all.
    """
    real = sequences * settings.length * settings.mean_share
    batches = min(sequences, math.ceil(real / budget))
    computed = round(sequences / batches * settings.length)
    note = f" (padded; mean length {settings.mean_share:.2g} of the longest)" if settings.mean_share < 1 else ""
    return Load(computed, round(real / batches), note)


def layer_activations(shape: ModelShape, bytes_each: int) -> int:
    """Bytes a token that autograd saves in one layer.

    Two norms save a float32 copy of their input and of its product, their output in the working precision twice; attention saves
    queries, keys, values and output; the gated MLP saves four tensors of its width.
    """
    norms = shape.norms_per_layer * shape.hidden * (4 + 2 * bytes_each)
    attention = bytes_each * (2 * shape.query_size + 2 * shape.kv_size)
    return norms + attention + 4 * bytes_each * mlp_width(shape)


def mlp_width(shape: ModelShape) -> int:
    """Width of what a token passes through in an MLP layer: the dense one, or its experts together."""
    if not shape.experts:
        return shape.intermediate
    return shape.experts_per_token * (shape.expert_intermediate + shape.hidden // 2) + shape.shared_intermediate


def saved(shape: ModelShape, engine: EngineSettings, load: Load) -> Item:
    """What is kept for the backward pass: each layer's input with gradient checkpointing, everything without."""
    each = engine.compute_bytes
    if not engine.checkpointing:
        size = layer_activations(shape, each)
        formula = f"{load} x {shape.layers} layers x {size:,} B"
        return _passing("activations", load.computed * shape.layers * size, formula)
    layers = 2 if engine.activation_offload else shape.layers
    formula = f"{load} x {layers} layers x {shape.hidden} x {each} B"
    return _passing("checkpointed activations", load.computed * layers * shape.hidden * each, formula)


def _passing(name: str, size: float, formula: str) -> Item:
    """An item that is allocated and freed in every pass."""
    return item(name, size, formula, margin=FRAGMENTS)


def recomputed(shape: ModelShape, engine: EngineSettings, count: int) -> int:
    """Bytes of the layer in its backward pass: its activations, unless they are saved, and their gradients."""
    each = engine.compute_bytes
    own = layer_activations(shape, each) if engine.checkpointing else 0
    return count * (own + each * (3 * mlp_width(shape) + 2 * shape.hidden))


def entropy_bytes(engine: EngineSettings) -> tuple[int, int]:
    """Bytes a logit for the entropy beside the logits: at its peak, and what stays for a backward pass.

    Under autocast softmax and logsumexp work in float32 (ATen/autocast_mode.h): probabilities, a cast of the logits and their
    exponentials, 4 B each (verl/utils/torch_functional.py, entropy_from_logits). Compiled, it is taken to be fused.
    """
    if engine.compiled and engine.remove_padding:
        return 0, engine.compute_bytes
    cast = 4 if engine.compute_bytes < 4 else 0
    return 8 + cast, 4 + cast


def train_logits(shape: ModelShape, engine: EngineSettings, load: Load, temperature: float) -> Item:
    """Logits of a pass with gradients (verl/workers/engine/fsdp/transformer_impl.py:1332-1545)."""
    each = engine.compute_bytes
    if engine.fused_kernels:
        size = min(load.computed, FUSED_CHUNK) * shape.vocab * FUSED_BACKWARD + 2 * shape.vocab * shape.hidden * each
        formula = f"fused: {FUSED_CHUNK} tokens x {shape.vocab:,} x {FUSED_BACKWARD} B + gradient of the head"
        return _passing("logits", size, formula)
    computed = each * (1 + (temperature != 1))
    real = (0 if engine.remove_padding else each) + (0 if engine.flash_attention else 4)
    if not engine.train_entropy:
        return _logits(shape, load, computed, real)
    peak, kept = entropy_bytes(engine)
    return max(_logits(shape, load, computed + peak, 0), _logits(shape, load, computed + kept, real), key=_size)


def infer_logits(shape: ModelShape, engine: EngineSettings, load: Load, temperature: float, *, entropy: bool) -> Item:
    """Logits of a pass without gradients; verl takes the entropy along with old log-probs (trainer/ppo/v1/trainer_base.py:1653)."""
    each = engine.compute_bytes
    if engine.fused_kernels:
        size = min(load.computed, FUSED_CHUNK) * shape.vocab * FUSED_FORWARD
        return _passing("logits", size, f"fused: {FUSED_CHUNK} tokens x {shape.vocab:,} x {FUSED_FORWARD} B")
    computed = each * (1 + (temperature != 1))
    packed = _logits(shape, load, computed, 0 if engine.remove_padding else each)
    if not entropy:
        return packed
    peak, _ = entropy_bytes(engine)
    if engine.entropy_chunk and engine.remove_padding:
        peak = round(peak * min(1, engine.entropy_chunk / load.computed))
    return max(packed, _logits(shape, load, computed + peak, 0), key=_size)


def _logits(shape: ModelShape, load: Load, computed: int, real: int) -> Item:
    """Logits at `computed` bytes each, and at `real` bytes more for those that are not padding."""
    if load.real == load.computed:
        computed, real = computed + real, 0
    size = shape.vocab * (load.computed * computed + load.real * real)
    more = f" + {load.real:,} x {shape.vocab:,} x {real} B" if real else ""
    return _passing("logits", size, f"{load} x {shape.vocab:,} x {computed} B{more}")


def training(shape: ModelShape, model: Model, settings: TrainerSettings, role: str) -> tuple[Item, ...]:
    """States and passes of an update, at the moment that takes most: logits, a layer's backward, the last reduction, Adam's step."""
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
    """A pass without gradients, without the states; `logits` is off for a critic."""
    engine = model.engine
    load = tokens(batch, settings, engine, settings.train_batch)
    wide = engine.compute_bytes * (3 * mlp_width(shape) + 4 * shape.hidden) + 4 * shape.hidden
    weights = item("gathered layers", gathered(model), "unsharded working copies of FSDP")
    layer = _passing("activations", load.computed * wide, f"{load} x {wide:,} B of one layer")
    if not logits:
        return (weights, layer)
    return (weights, max(layer, infer_logits(shape, engine, load, settings.temperature, entropy=entropy), key=_size))


def _size(part: Item) -> int:
    return part.bytes

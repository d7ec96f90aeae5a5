"""What FSDP keeps of a model on one GPU: sharded states, and the layers that it gathers while they work.

States are those of ZeRO stage 3 (Rajbhandari et al., 2019, arXiv 1910.02054, section 5.3) in verl's precisions: parameters,
gradients and Adam's two moments in float32, working copies in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli.fit.items import Item, item
from flashrl_cli.fit.shape import parameters
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.fit.shape import ModelShape
    from flashrl_cli.verl.memory_keys import EngineSettings

LAYERS_GATHERED = {"fsdp": 2, "fsdp2": 3}
"""Layers in bfloat16 at once: the one at work, the one prefetched, and FSDP2's buffer to copy out of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model in one FSDP engine: parameter counts of its units, and how many GPUs share it."""

    total: int
    trained: int
    layer: int
    """Parameters of the largest layer."""
    embeddings: int
    head: int
    """0 for a tied head or a critic's."""
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
        """Parameters outside the layers, of which FSDP1 makes one unit."""
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
    """Parameters of a LoRA adapter, rank * (inputs + outputs) a matrix (Hu et al., 2021); packed experts get none."""
    q, kv, hidden, wide = shape.query_size, shape.kv_size, shape.hidden, shape.intermediate
    attention = {"q_proj": hidden + q, "k_proj": hidden + kv, "v_proj": hidden + kv, "o_proj": q + hidden}
    mlp = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + wide)
    dense = shape.layers - shape.expert_layers
    chosen = {name for name in {*attention, *mlp} if targets is None or name in targets}
    sides = shape.layers * sum(size for name, size in attention.items() if name in chosen)
    return rank * (sides + dense * sum(size for name, size in mlp.items() if name in chosen))


def resident(model: Model, role: str, *, training: bool = False, loaded: bool = False) -> tuple[Item, ...]:
    """States of a model that are on the GPU: all while it trains, parameters when it is `loaded` to work, else what is not offloaded.

    verl loads parameters and optimizer at the start of a phase and puts them back at its end (verl/workers/engine/base.py:314).
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
    """Bytes of the unsharded copies while the model works.

    FSDP1 keeps the unit of embeddings and head from the forward to the end of the backward; FSDP2 as verl wraps it gathers each when
    it is needed (verl/utils/fsdp_utils.py:549). Without resharding the whole model stays.
    """
    engine = model.engine
    if not engine.reshard:
        return model.total * engine.compute_bytes
    layers = LAYERS_GATHERED[engine.strategy] * model.layer
    outside = model.root if engine.strategy == "fsdp" or not model.head else max(model.embeddings, model.head)
    return (layers + outside) * engine.compute_bytes


def unsharded_gradients(model: Model, parameters: int) -> int:
    """Bytes to reduce the gradients of a unit: in the working precision, then in that of the reduction."""
    if model.frozen:
        return 0
    return parameters * (model.engine.compute_bytes + model.engine.reduce_bytes)


def kept_gradients(model: Model) -> int:
    """Bytes of unsharded gradients that stay between micro-batches when their synchronization is deferred."""
    engine = model.engine
    if not engine.no_sync:
        return 0
    return model.trained * (engine.compute_bytes if engine.strategy == "fsdp" else engine.reduce_bytes)

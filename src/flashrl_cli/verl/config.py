"""How many engines a run's rollout has, and how many of them stay in bf16.

What the rules of this package judge: a resolved spec, its overrides and verl's composed tree, with the derived sizes.

What decides memory in verl's composed configuration, under names of our own: the keys that `fit` reads and advises.

Where verl keeps a setting twice, this follows what its FSDP engine reads (verl/workers/engine/fsdp/transformer_impl.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flashrl_cli import contract
from flashrl_cli.errors import Problem
from flashrl_cli.verl.overrides import ACTOR, ENGINE, TABLE, Override, quote

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.verl.compose import Tree

REF = "actor_rollout_ref.ref"
MODEL = "actor_rollout_ref.model"
FIELDS = {entry.key: entry.field for entry in TABLE}
SEQUENCE_PARALLEL = {
    # The first above 1 counts (verl/workers/config/actor.py:331); the critic's other key is never read.
    "actor": (f"{ACTOR}.ulysses_sequence_parallel_size", f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size"),
    "reference policy": (f"{REF}.ulysses_sequence_parallel_size", f"{REF}.fsdp_config.ulysses_sequence_parallel_size"),
    "critic": ("critic.fsdp.ulysses_sequence_parallel_size",),
}
"""Keys of each trained (or scored) model's sequence-parallel degree."""


class Shape(Protocol):
    """The numbers of a model's config.json that rules need (`fit.shape.ModelShape` has them)."""

    @property
    def architecture(self) -> str:
        """Its `model_type`."""
        ...

    @property
    def hidden(self) -> int:
        """Width of the hidden state."""
        ...

    @property
    def heads(self) -> int:
        """Query heads."""
        ...

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        ...

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        ...

    @property
    def intermediate(self) -> int:
        """Width of the dense MLP."""
        ...

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence."""
        ...

    @property
    def experts(self) -> int:
        """Experts of a layer; 0 for a dense model."""
        ...

    @property
    def expert_intermediate(self) -> int:
        """Width of one expert."""
        ...

    @property
    def shared_intermediate(self) -> int:
        """Width of the expert that sees every token; 0 for none."""
        ...

    @property
    def dense_layers(self) -> int:
        """Layers of a mixture of experts that have a dense MLP."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a rule may ask. `shape` is None where the model is not known on this machine."""

    resolved: Resolved
    overrides: Sequence[Override]
    tree: Tree
    shape: Shape | None = None

    @property
    def spec(self) -> RunSpec:
        """The typed spec."""
        return self.resolved.spec

    def get(self, key: str) -> Any:
        """Value of verl's key after composition, defaults included; None where there is none."""
        return self.tree.get(key)

    def size(self, key: str) -> int | None:
        """A whole number at the key; None for anything else."""
        value = self.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def where(self, *keys: str) -> str | None:
        """Where the first of these keys (or fields) that a person set was written; an option given for this run before any preset."""
        written = {**self.resolved.origins, **{override.key: override.origin for override in self.overrides}}
        origins = [written[key] for key in keys if key in written]
        for layers in (("set", "option"), ("preset",)):
            for origin in origins:
                if origin.layer in layers:
                    return origin.where
        return None

    def name(self, key: str) -> str:
        """The key as a person writes it: the typed field that becomes it, or `verl.KEY`."""
        return FIELDS.get(key, f"verl.{key}")

    def fix(self, key: str, value: Any, *, new: bool = False) -> str:
        """The option that sets the key; `new` for one that verl's tree lacks."""
        name = FIELDS.get(key, f"verl.{'+' if new else ''}{key}")
        text = str(value).lower() if isinstance(value, bool) else quote(value)
        return f"--set '{name}={text}'" if "[" in text else f"--set {name}={text}"

    def problem(self, message: str, hint: str, *keys: str) -> Problem:
        """A problem that was written at the first of `keys` that a person set."""
        return Problem(message, self.where(*keys), hint)

    @property
    def gpus(self) -> int:
        """Devices (trainer processes) of the run."""
        return self.spec.resources.nodes * self.spec.resources.gpus_per_node

    @property
    def engine_gpus(self) -> int:
        """Devices an engine takes (verl/workers/rollout/replica.py:107)."""
        return self.spec.rollout.tensor_parallel * (self.size("actor_rollout_ref.rollout.data_parallel_size") or 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that can come back from the engine."""
        data = self.spec.data
        both = data.max_prompt_length + data.max_response_length
        return min(both, self.spec.rollout.max_model_len or both)

    @property
    def has_critic(self) -> bool:
        """Whether verl trains a critic (verl/trainer/ppo/utils.py:96)."""
        enabled = self.get("critic.enable")
        return bool(enabled) if enabled is not None else self.spec.algorithm.advantage == "gae"

    @property
    def has_reference(self) -> bool:
        """Whether verl scores a reference policy (verl/trainer/ppo/utils.py:75)."""
        return self.spec.algorithm.kl_loss or self.spec.algorithm.kl_in_reward

    @property
    def has_adapter(self) -> bool:
        """Whether the policy trains LoRA; the reference policy is then the policy without it."""
        return (self.size(f"{MODEL}.lora_rank") or 0) > 0

    @property
    def refits_with_flashrl(self) -> bool:
        """Whether the engine's weights come through flashrl's worker extension."""
        return bool(self.get(f"{ENGINE}.worker_extension_cls") == contract.WORKER_EXTENSION)

    def sequence_parallel(self, role: str) -> int:
        """Devices that share a sequence in the training of `role`."""
        degrees = [self.size(key) or 1 for key in SEQUENCE_PARALLEL[role]]
        return next((degree for degree in degrees if degree > 1), 1)

    def data_parallel(self, role: str) -> int | None:
        """Shares that a batch of `role` is split into; None where sequence parallelism does not fit the devices."""
        degree = self.sequence_parallel(role)
        return self.gpus // degree if self.gpus % degree == 0 else None

    def roles(self) -> Iterator[str]:
        """Models that verl builds for training: a key of SEQUENCE_PARALLEL each."""
        yield "actor"
        if self.has_reference and not self.has_adapter:
            yield "reference policy"
        if self.has_critic:
            yield "critic"


Rule = Callable[[Settings], Iterator[Problem]]


def largest_divisor(number: int, at_most: int) -> int:
    """Largest divisor of `number` that is not above `at_most`."""
    return max(d for d in range(1, max(at_most, 1) + 1) if number % d == 0)


ROLLOUT = "actor_rollout_ref.rollout"
CRITIC_TOKENS = 32768
"""Default of critic.ppo_infer_max_token_len_per_gpu, which verl's tree leaves out (verl/workers/config/critic.py)."""
DTYPE_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
LOG_PROB_TOKENS = f"{ROLLOUT}.log_prob_max_token_len_per_gpu"
SET_KEYS = {
    "remove_padding": "verl.actor_rollout_ref.model.use_remove_padding",
    "critic_remove_padding": "verl.critic.model.use_remove_padding",
    "checkpointing": "verl.actor_rollout_ref.model.enable_gradient_checkpointing",
    "fused_kernels": "verl.actor_rollout_ref.model.use_fused_kernels",
    "optimizer_offload": "verl.actor_rollout_ref.actor.fsdp_config.optimizer_offload",
    "param_offload": "verl.actor_rollout_ref.actor.fsdp_config.param_offload",
    "offload_policy": "verl.actor_rollout_ref.actor.fsdp_config.offload_policy",
    "micro_batch": "algorithm.micro_batch_size_per_gpu",
    "token_budget": "verl.actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "log_prob_tokens": f"verl.{LOG_PROB_TOKENS}",
    "log_prob_micro_batch": "rollout.log_prob_micro_batch_size_per_gpu",
    "critic_checkpointing": "verl.critic.model.enable_gradient_checkpointing",
    "critic_optimizer_offload": "verl.critic.fsdp.optimizer_offload",
    "critic_param_offload": "verl.critic.fsdp.param_offload",
    "critic_tokens": "critic.max_tokens_per_gpu",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "tensor_parallel": "rollout.tensor_parallel",
    "max_num_batched_tokens": "rollout.max_num_batched_tokens",
    "gpus_per_node": "resources.gpus_per_node",
}
"""What can be changed to save memory, and the key that `--set` takes for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One forward pass: `sequences` of them, or `tokens` a GPU where verl batches by tokens."""

    sequences: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One FSDP engine of verl: how a model is sharded, what is offloaded, what a forward pass holds. Sizes in bytes an element."""

    strategy: str = "fsdp"
    fsdp_size: int = -1
    sequence_parallel: int = 1
    param_offload: bool = False
    optimizer_offload: bool = False
    offload_policy: bool = False
    reshard: bool = True
    no_sync: bool = False
    """Whether gradients stay unsharded between the micro-batches of a mini-batch."""
    model_bytes: int = 4
    compute_bytes: int = 2
    reduce_bytes: int = 4
    adam_bytes: int = 8
    """Optimizer state of one parameter."""
    train: Batch
    infer: Batch
    checkpointing: bool = True
    activation_offload: bool = False
    remove_padding: bool = True
    fused_kernels: bool = False
    flash_attention: bool = True
    """Whether log-probs come from flash-attn's cross-entropy, judged by the attention that the model uses."""
    compiled: bool = True
    train_entropy: bool = False
    entropy_chunk: int | None = None
    lora_rank: int = 0
    lora_targets: tuple[str, ...] | None = None
    """Names of the adapted linear layers; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """One vLLM engine; tokens and sequences are limits of its scheduler."""

    precision: str
    tensor_parallel: int
    gpu_memory_utilization: float
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eager: bool = False
    sleeps: bool = True
    kv_bytes: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """A run, as far as memory goes. Lengths in tokens, `bucket` in bytes."""

    nodes: int
    gpus_per_node: int
    prompt: int
    response: int
    train_batch: int
    mini_batch: int
    n: int
    temperature: float
    actor: EngineSettings
    critic: EngineSettings | None
    reference: Batch | None
    """Forward pass of a reference policy that is a model of its own; None without one."""
    rollout: RolloutSettings
    bucket: int
    colocated: bool = True
    log_probs_follow: bool = True
    """Whether log-probs have the update's token budget, as verl's default has it, rather than one of their own."""
    mean_share: float = 0.5
    """Mean length of the sequences as a share of the longest. Nothing in a configuration tells it; it counts where sequences are padded."""

    @property
    def world(self) -> int:
        """GPUs that train."""
        return self.nodes * self.gpus_per_node

    @property
    def length(self) -> int:
        """Longest sequence."""
        return self.prompt + self.response


def settings_of(spec: RunSpec, tree: Tree) -> TrainerSettings:
    """What decides memory in a composed configuration. Raises ValueError for a training engine other than FSDP."""
    critic = spec.algorithm.advantage == "gae"
    return TrainerSettings(
        nodes=tree.get("trainer.nnodes"),
        gpus_per_node=tree.get("trainer.n_gpus_per_node"),
        prompt=tree.get("data.max_prompt_length"),
        response=tree.get("data.max_response_length"),
        train_batch=tree.get("data.train_batch_size"),
        mini_batch=tree.get(f"{ACTOR}.ppo_mini_batch_size"),
        n=tree.get(f"{ROLLOUT}.n"),
        temperature=tree.get(f"{ROLLOUT}.temperature"),
        actor=_actor(tree),
        critic=_critic(tree) if critic else None,
        reference=_reference(spec, tree),
        rollout=_rollout(spec, tree),
        bucket=tree.get(f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes") << 20,
        colocated=tree.get("trainer.v1.trainer_mode") != "separate_async",
        log_probs_follow=LOG_PROB_TOKENS not in {key.lstrip("+") for key in spec.verl},
    )


def _actor(tree: Tree) -> EngineSettings:
    dynamic = bool(tree.get(f"{ACTOR}.use_dynamic_bsz"))
    chunked = tree.get(f"{ACTOR}.entropy_from_logits_with_chunking")
    entropy = tree.get(f"{ACTOR}.calculate_entropy") or tree.get(f"{ACTOR}.entropy_coeff")
    return EngineSettings(
        **_fsdp(tree, ACTOR, f"{ACTOR}.fsdp_config", MODEL),
        train=_batch(tree, dynamic, f"{ACTOR}.ppo_micro_batch_size_per_gpu", f"{ACTOR}.ppo_max_token_len_per_gpu"),
        infer=_batch(
            tree,
            dynamic,
            f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu",
            LOG_PROB_TOKENS,
        ),
        fused_kernels=bool(tree.get(f"{MODEL}.use_fused_kernels")),
        train_entropy=bool(entropy),
        entropy_chunk=tree.get(f"{ACTOR}.entropy_from_logits_chunk_size") if chunked else None,
    )


def _critic(tree: Tree) -> EngineSettings:
    # V1 gives the critic one budget for all its passes (verl/trainer/ppo/v1/trainer_base.py:266)
    tokens = Batch(tokens=tree.get("critic.ppo_infer_max_token_len_per_gpu") or CRITIC_TOKENS)
    return EngineSettings(**_fsdp(tree, "critic", "critic.fsdp", "critic.model"), train=tokens, infer=tokens)


def _reference(spec: RunSpec, tree: Tree) -> Batch | None:
    """With LoRA the reference is the actor without its adapter (verl/trainer/ppo/v1/trainer_base.py:237)."""
    if not (spec.algorithm.kl_loss or spec.algorithm.kl_in_reward) or _lora_rank(tree, MODEL):
        return None
    ref = "actor_rollout_ref.ref"
    dynamic = bool(tree.get(f"{ref}.log_prob_use_dynamic_bsz"))
    return _batch(tree, dynamic, f"{ref}.log_prob_micro_batch_size_per_gpu", f"{ref}.log_prob_max_token_len_per_gpu")


def _batch(tree: Tree, dynamic: bool, sequences: str, tokens: str) -> Batch:
    return Batch(tokens=tree.get(tokens)) if dynamic else Batch(sequences=tree.get(sequences) or 1)


def _fsdp(tree: Tree, role: str, fsdp: str, model: str) -> dict[str, Any]:
    """Settings that actor and critic share."""
    strategy = tree.get(f"{role}.strategy")
    if strategy not in {"fsdp", "fsdp2"}:
        raise ValueError(f"memory is estimated for FSDP only, not for {strategy}")
    get = tree.get(fsdp)
    mixed = get.get("mixed_precision") or {}
    attention = (tree.get(f"{model}.override_config") or {}).get("attn_implementation", "flash_attention_2")
    targets = tree.get(f"{model}.target_modules")
    eight_bit = "8bit" in str(tree.get(f"{role}.optim.optimizer"))
    model_bytes = DTYPE_BYTES[get.get("model_dtype") or "fp32"]
    deprecated = tree.get(f"{ACTOR}.ulysses_sequence_parallel_size") if role == ACTOR else 1
    return {
        "strategy": strategy,
        "fsdp_size": get["fsdp_size"],
        "sequence_parallel": deprecated if deprecated > 1 else get["ulysses_sequence_parallel_size"],
        "param_offload": get["param_offload"],
        "optimizer_offload": get["optimizer_offload"],
        "offload_policy": get["offload_policy"] and strategy == "fsdp2",
        "reshard": get["reshard_after_forward"],
        "no_sync": get["use_no_sync_for_gradient_accumulation"],
        "model_bytes": model_bytes,
        "compute_bytes": DTYPE_BYTES[mixed.get("param_dtype", "bf16")],
        "reduce_bytes": DTYPE_BYTES[mixed.get("reduce_dtype", "fp32")],
        "adam_bytes": 2 if eight_bit else 2 * model_bytes,
        "checkpointing": bool(tree.get(f"{model}.enable_gradient_checkpointing")),
        "activation_offload": bool(tree.get(f"{model}.enable_activation_offload")),
        "remove_padding": bool(tree.get(f"{model}.use_remove_padding")),
        "flash_attention": "flash" in str(attention),
        "compiled": get["use_torch_compile"],
        "lora_rank": _lora_rank(tree, model),
        "lora_targets": tuple(targets) if isinstance(targets, list) else None,
    }


def _lora_rank(tree: Tree, model: str) -> int:
    return tree.get(f"{model}.lora.rank") or tree.get(f"{model}.lora_rank") or 0


def _rollout(spec: RunSpec, tree: Tree) -> RolloutSettings:
    engine = tree.get(f"{ROLLOUT}.engine_kwargs.vllm") or {}
    return RolloutSettings(
        # a mixed run must fit where its larger replicas are
        precision="bf16" if spec.rollout.mix else spec.rollout.precision,
        tensor_parallel=tree.get(f"{ROLLOUT}.tensor_model_parallel_size"),
        gpu_memory_utilization=tree.get(f"{ROLLOUT}.gpu_memory_utilization"),
        max_num_seqs=tree.get(f"{ROLLOUT}.max_num_seqs"),
        max_num_batched_tokens=tree.get(f"{ROLLOUT}.max_num_batched_tokens"),
        max_model_len=tree.get(f"{ROLLOUT}.max_model_len")
        or spec.data.max_prompt_length + spec.data.max_response_length,
        eager=bool(tree.get(f"{ROLLOUT}.enforce_eager")),
        sleeps=bool(tree.get(f"{ROLLOUT}.free_cache_engine")),
        kv_bytes=1 if "fp8" in str(engine.get("kv_cache_dtype")) else 2,
    )


DATA_PARALLEL = "actor_rollout_ref.rollout.data_parallel_size"
ROUNDING = 1e-9
"""0.07 x 100 is a little more than 7 in binary."""


def engine_devices(spec: RunSpec) -> int:
    """Devices an engine takes (verl/workers/rollout/replica.py:107; verl has no pipeline parallelism for vLLM)."""
    width = spec.verl.get(DATA_PARALLEL, spec.verl.get(f"+{DATA_PARALLEL}"))
    return spec.rollout.tensor_parallel * (width if isinstance(width, int) and width > 0 else 1)


def replicas(spec: RunSpec) -> int:
    """Engines of a run whose rollout shares the trainer's devices (verl/workers/rollout/llm_server.py:460)."""
    return spec.resources.nodes * spec.resources.gpus_per_node // engine_devices(spec)


def bf16_replicas(spec: RunSpec) -> int:
    """Replicas that `rollout.mix` leaves in bf16, the first ones: its share of all, rounded up."""
    return math.ceil(spec.rollout.mix * replicas(spec) - ROUNDING)

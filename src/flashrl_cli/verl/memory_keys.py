"""What decides memory in verl's composed configuration, under names of our own: the keys that `fit` reads and advises.

Where verl keeps a setting twice, this follows what its FSDP engine reads (verl/workers/engine/fsdp/transformer_impl.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.verl.compose import Tree

ACTOR = "actor_rollout_ref.actor"
MODEL = "actor_rollout_ref.model"
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

"""verl's composed configuration of a run under typed names, for the rules of `lint` and for the memory estimate.

Where verl has a setting under two keys, this module reads the one that verl's FSDP engine reads
(verl/workers/engine/fsdp/transformer_impl.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from flashrl_cli import contract
from flashrl_cli.errors import Location, Problem
from flashrl_cli.precision import KV_CACHES
from flashrl_cli.verl.overrides import (
    ACTOR,
    ATTENTION,
    ENGINE,
    LOSS_FIELD,
    LOSS_MODE,
    MODE,
    MODE_FIELD,
    MODEL,
    REF,
    ROLLOUT,
    TABLE,
    Override,
    quote,
)

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.verl.compose import Tree
    from flashrl_cli.weights.shape import ModelShape

TENSOR_PARALLEL = f"{ROLLOUT}.tensor_model_parallel_size"
DATA_PARALLEL = f"{ROLLOUT}.data_parallel_size"
VALIDATION_SAMPLES = f"{ROLLOUT}.val_kwargs.n"
"""Key of the number of responses to a prompt in validation."""
VALIDATION_LIMIT = "data.val_max_samples"
"""Key of the largest number of prompts that a validation takes; below 1 for all."""
FIELDS = {entry.key: entry.field for entry in TABLE}
FIELDS |= {LOSS_MODE: LOSS_FIELD, MODE: MODE_FIELD}
FIELDS |= {f"{node}.{ATTENTION}": "model.attention" for node in (MODEL, "critic.model")}
MASKED = ("sdpa", "eager")
"""Attention implementations that compute the scores of all pairs of a packed pass, and mask those across sequences."""
DTYPE_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}


class Role(NamedTuple):
    """Nodes and keys of verl's tree that configure one model which verl trains or scores with."""

    node: str
    fsdp: str
    model: str
    sequence_parallel: tuple[str, ...]
    """Keys of the sequence-parallel degree, of which the first above 1 counts (verl/workers/config/actor.py:331)."""

    @property
    def strategy(self) -> str:
        """Key of the training engine's name."""
        return f"{self.node}.strategy"

    @property
    def padding(self) -> str:
        """Key of the switch that removes padding from the input."""
        return f"{self.model}.use_remove_padding"

    @property
    def compute_dtype(self) -> str:
        """Key of the dtype in which FSDP computes; verl's tree lacks it, so it is given with a `+`."""
        return f"{self.fsdp}.mixed_precision.param_dtype"

    @property
    def attention(self) -> str:
        """Key of Transformers' attention implementation; verl's tree lacks it, so it is given with a `+`."""
        return f"{self.model}.{ATTENTION}"


ROLES = {
    "actor": Role(
        ACTOR,
        f"{ACTOR}.fsdp_config",
        MODEL,
        (f"{ACTOR}.ulysses_sequence_parallel_size", f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size"),
    ),
    "reference policy": Role(
        REF,
        f"{REF}.fsdp_config",
        MODEL,
        (f"{REF}.ulysses_sequence_parallel_size", f"{REF}.fsdp_config.ulysses_sequence_parallel_size"),
    ),
    # `critic.ulysses_sequence_parallel_size` is not listed: verl never reads it
    "critic": Role("critic", "critic.fsdp", "critic.model", ("critic.fsdp.ulysses_sequence_parallel_size",)),
}


class Pass(NamedTuple):
    """One of verl's passes over a batch: the model's role, and the keys that decide how the batch is split."""

    name: str
    role: str
    dynamic: str
    micro: str
    whole_micro: str
    """Key of the micro-batch size over all devices, which verl replaced with the one per device."""
    tokens: str


UPDATE = Pass(
    "policy update",
    "actor",
    f"{ACTOR}.use_dynamic_bsz",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu",
    f"{ACTOR}.ppo_micro_batch_size",
    f"{ACTOR}.ppo_max_token_len_per_gpu",
)
LOG_PROBS = Pass(
    "recomputation of log-probs",
    "actor",
    f"{ROLLOUT}.log_prob_use_dynamic_bsz",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu",
    f"{ROLLOUT}.log_prob_micro_batch_size",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
)
REFERENCE = Pass(
    "reference policy",
    "reference policy",
    f"{REF}.log_prob_use_dynamic_bsz",
    f"{REF}.log_prob_micro_batch_size_per_gpu",
    f"{REF}.log_prob_micro_batch_size",
    f"{REF}.log_prob_max_token_len_per_gpu",
)
CRITIC = Pass(
    "critic",
    "critic",
    "critic.use_dynamic_bsz",
    "critic.ppo_micro_batch_size_per_gpu",
    "critic.ppo_micro_batch_size",
    "critic.ppo_infer_max_token_len_per_gpu",
)
CRITIC_TOKENS = 32768
"""The critic's token budget where none is set (verl/workers/config/critic.py:89); verl's tree lacks the key."""


def engine_devices(spec: RunSpec) -> int:
    """Devices of one engine (verl/workers/rollout/replica.py:107; verl has no pipeline parallelism for vLLM)."""
    width = spec.verl.get(DATA_PARALLEL, spec.verl.get(f"+{DATA_PARALLEL}"))
    return spec.rollout.tensor_parallel * (width if isinstance(width, int) and width > 0 else 1)


def replicas(spec: RunSpec) -> int:
    """Engines of a run (verl/workers/rollout/llm_server.py:460)."""
    return spec.resources.rollout_devices // engine_devices(spec)


def bf16_replicas(spec: RunSpec) -> int:
    """Number of replicas that `rollout.mix` leaves in bf16: its share of all, rounded up; they are the first ones."""
    # 0.07 x 100 is a little more than 7 in binary floating point
    return math.ceil(spec.rollout.mix * replicas(spec) - 1e-9)


def written(key: str, *, new: bool = False) -> str:
    """The name under which a preset sets a verl key: the typed field that becomes it, or `verl.KEY`.

    `new` is for a key that verl's tree lacks.
    """
    return FIELDS.get(key, f"verl.{'+' if new else ''}{key}")


@dataclass(frozen=True, slots=True)
class Settings:
    """A resolved spec, its overrides and verl's composed tree.

    `shape` is None where the model is not known on this machine.
    """

    resolved: Resolved
    overrides: Sequence[Override]
    tree: Tree
    shape: ModelShape | None = None

    @property
    def spec(self) -> RunSpec:
        """The typed spec of the run."""
        return self.resolved.spec

    def get(self, key: str) -> Any:
        """Value of a verl key after composition, defaults included; None where the tree has none."""
        return self.tree.get(key)

    def size(self, key: str) -> int | None:
        """Value of a verl key if it is an integer; None for anything else."""
        value = self.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def where(self, *keys: str) -> Location | None:
        """Where the first of these keys (or fields) that the user set was written; None if the user set none.

        An option given for this run comes before any preset.
        """
        places = {**self.resolved.origins, **{override.key: override.origin for override in self.overrides}}
        origins = [places[key] for key in keys if key in places]
        for layers in (("set", "option"), ("preset",)):
            for origin in origins:
                if origin.layer in layers:
                    return origin.where
        return None

    def is_given(self, key: str) -> bool:
        """Whether a preset or an option set a verl key to anything but null."""
        return self.get(key) is not None and self.where(key) is not None

    def is_verbatim(self, key: str) -> bool:
        """Whether a verl key is given under `verl:`."""
        return not {key, f"+{key}"}.isdisjoint(self.spec.verl)

    def fix(self, key: str, value: Any, *, new: bool = False) -> str:
        """The command-line option that sets a verl key; `new` is for a key that verl's tree lacks."""
        text = str(value).lower() if isinstance(value, bool) else quote(value)
        return self.option(written(key, new=new), text)

    def option(self, name: str, value: Any) -> str:
        """The command-line option that sets a key of the spec: `--sweep` for a key that a sweep varies."""
        return self.resolved.option(name, value)

    def problem(self, message: str, hint: str, *keys: str) -> Problem:
        """A problem, located where the first of `keys` that the user set was written."""
        return Problem(message, self.where(*keys), hint)

    @property
    def devices(self) -> int:
        """Trainer processes of the run, one a GPU."""
        return self.spec.resources.devices

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the engine can return, prompt included."""
        return min(self.spec.data.max_length, self.spec.rollout.max_model_len or self.spec.data.max_length)

    @property
    def has_critic(self) -> bool:
        """Whether verl trains a critic (verl/trainer/ppo/utils.py:96)."""
        enabled = self.get("critic.enable")
        return bool(enabled) if enabled is not None else self.spec.algorithm.advantage == "gae"

    @property
    def has_reference(self) -> bool:
        """Whether verl computes log-probs of a reference policy (verl/trainer/ppo/utils.py:75)."""
        return self.spec.algorithm.kl_loss or self.spec.algorithm.kl_in_reward

    @property
    def has_adapter(self) -> bool:
        """Whether the policy is trained with LoRA.

        The reference policy is then the policy without its adapter (verl/trainer/ppo/v1/trainer_base.py:237).
        """
        return self.lora_rank("actor") > 0

    def lora_rank(self, role: str) -> int:
        """Rank of a model's LoRA adapter; 0 for none.

        FSDP reads `lora_rank` (verl/workers/engine/fsdp/transformer_impl.py:162); `lora.rank` is Megatron's.
        """
        return self.size(f"{ROLES[role].model}.lora_rank") or 0

    @property
    def refits_with_flashrl(self) -> bool:
        """Whether flashrl's worker extension, rather than verl's, writes the weights into the engine."""
        return bool(self.get(f"{ENGINE}.worker_extension_cls") == contract.WORKER_EXTENSION)

    def sequence_parallel(self, role: str) -> int:
        """Number of devices that share a sequence in the training of `role`; 1 without sequence parallelism."""
        degrees = [self.size(key) or 1 for key in ROLES[role].sequence_parallel]
        return next((degree for degree in degrees if degree > 1), 1)

    def data_parallel(self, role: str) -> int | None:
        """Shares that a batch of `role` is split into; None if sequence parallelism does not fit the devices."""
        devices, degree = self.devices, self.sequence_parallel(role)
        return devices // degree if devices % degree == 0 else None

    def roles(self) -> Iterator[str]:
        """Yield the roles (keys of ROLES) for which verl builds a separate model in the trainer."""
        yield "actor"
        if self.has_reference and not self.has_adapter:
            yield "reference policy"
        if self.has_critic:
            yield "critic"

    def by_tokens(self, step: Pass) -> bool:
        """Whether a pass is split by tokens; V1's critic always is (verl/trainer/ppo/v1/trainer_base.py:266)."""
        return step is CRITIC or bool(self.get(step.dynamic))

    def token_budget(self, step: Pass) -> int | None:
        """Tokens that a device takes at once in a pass that splits its batch by tokens; None if no budget is set."""
        return self.size(step.tokens) or (CRITIC_TOKENS if step is CRITIC else None)


Rule = Callable[[Settings], Iterator[Problem]]


def largest_divisor(number: int, at_most: int) -> int:
    """Largest divisor of `number` that is at most `at_most`."""
    return max(d for d in range(1, max(at_most, 1) + 1) if number % d == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Size of one forward pass on a GPU: `sequences`, or `tokens` where verl batches by tokens."""

    sequences: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One FSDP engine of verl: how a model is sharded, what is offloaded, and what a forward pass holds.

    Fields that end in `_bytes` are sizes per element, in bytes.
    """

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
    """Optimizer state of one parameter, in bytes."""
    train: Batch
    infer: Batch
    checkpointing: bool = True
    activation_offload: bool = False
    remove_padding: bool = True
    fused_kernels: bool = False
    flash_attention: bool = True
    """Whether log-probs come from flash-attn's cross-entropy, judged by the attention that the model uses.

    The entropy is verl's own then; otherwise both are flashrl's (plugins/log_probs.py).
    """
    packable: bool = True
    """Whether packed sequences have, or would have, an attention without a mask of the whole pass."""
    compiled: bool = True
    train_entropy: bool = False
    entropy_chunk: int | None = None
    lora_rank: int = 0
    lora_targets: tuple[str, ...] | None = None
    """Names of the linear layers that LoRA adapts; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """One vLLM engine; the numbers of tokens and sequences are limits of its scheduler."""

    precision: str
    tensor_parallel: int
    gpu_memory_utilization: float
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eager: bool = False
    sleeps: bool = True
    kv_bytes: int = 2
    """Bytes of a number in the KV cache."""
    kv_scale_bytes: int = 0
    """Bytes of the scale of a token's keys, or values, of one head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """What decides the memory of a run; lengths are in tokens, `bucket` is in bytes."""

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
    """Forward pass of a reference policy that is a separate model; None without one."""
    rollout: RolloutSettings
    bucket: int
    rollout_gpus: int = 0
    """GPUs of the engines alone; 0 where the engines share the trainer's."""
    prefetch: float = 0
    """Batches that are sampled ahead of the one that is trained on."""
    log_probs_follow: bool = True
    """Whether log-probs take the policy update's token budget (verl's default) rather than a separately set one."""
    mean_share: float = 0.5
    """Mean length of the sequences as a share of the longest.

    No configuration sets it; it matters where sequences are padded.
    """

    @property
    def world(self) -> int:
        """Number of the trainer's GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def colocated(self) -> bool:
        """Whether the engines share the trainer's GPUs."""
        return not self.rollout_gpus

    @property
    def engines(self) -> int:
        """Number of engines."""
        return max(1, (self.rollout_gpus or self.world) // self.rollout.tensor_parallel)

    @property
    def scored(self) -> int:
        """Prompts to whose responses log-probs are computed at once.

        A trainer apart from the engines takes a mini-batch at a time (verl/trainer/ppo/v1/trainer_base.py:541).
        """
        return self.train_batch if self.colocated else self.mini_batch

    @property
    def length(self) -> int:
        """Longest sequence, prompt and response together, in tokens."""
        return self.prompt + self.response


def trainer_settings(s: Settings) -> TrainerSettings:
    """What decides memory in a composed configuration; raises ValueError for a training engine other than FSDP."""
    return TrainerSettings(
        nodes=s.spec.resources.nodes,
        gpus_per_node=s.spec.resources.gpus_per_node,
        prompt=s.spec.data.max_prompt_length,
        response=s.spec.data.max_response_length,
        train_batch=s.spec.data.train_batch_size,
        mini_batch=s.spec.algorithm.mini_batch_size,
        n=s.spec.rollout.n,
        temperature=s.spec.rollout.temperature,
        actor=_actor(s),
        critic=_engine(s, "critic", _batch(s, CRITIC), _batch(s, CRITIC)) if s.has_critic else None,
        reference=_batch(s, REFERENCE) if "reference policy" in s.roles() else None,
        rollout=_rollout(s),
        bucket=s.get(f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes") << 20,
        rollout_gpus=s.spec.resources.separate_devices,
        prefetch=0 if s.spec.trainer.mode == "sync" else s.spec.trainer.prefetch,
        log_probs_follow=s.spec.rollout.log_prob_max_tokens_per_gpu is None,
    )


def _batch(s: Settings, step: Pass) -> Batch:
    return Batch(tokens=s.token_budget(step)) if s.by_tokens(step) else Batch(sequences=s.size(step.micro) or 1)


def _actor(s: Settings) -> EngineSettings:
    chunked = s.get(f"{ACTOR}.entropy_from_logits_with_chunking")
    return _engine(
        s,
        "actor",
        _batch(s, UPDATE),
        _batch(s, LOG_PROBS),
        fused_kernels=bool(s.get(f"{MODEL}.use_fused_kernels")),
        train_entropy=bool(s.get(f"{ACTOR}.calculate_entropy") or s.get(f"{ACTOR}.entropy_coeff")),
        entropy_chunk=s.get(f"{ACTOR}.entropy_from_logits_chunk_size") if chunked else None,
    )


def _engine(s: Settings, name: str, train: Batch, infer: Batch, **more: Any) -> EngineSettings:
    """The training engine of `name` (a key of ROLES); `more` holds the fields that only this role sets."""
    role = ROLES[name]
    strategy = s.get(role.strategy)
    if strategy not in {"fsdp", "fsdp2"}:
        raise ValueError(f"memory is estimated for FSDP only, not for {strategy}")
    fsdp = s.get(role.fsdp)
    mixed = fsdp.get("mixed_precision") or {}
    targets = s.get(f"{role.model}.target_modules")
    model_bytes = DTYPE_BYTES[fsdp.get("model_dtype") or "fp32"]
    return EngineSettings(
        strategy=strategy,
        fsdp_size=fsdp["fsdp_size"],
        sequence_parallel=s.sequence_parallel(name),
        param_offload=fsdp["param_offload"],
        optimizer_offload=fsdp["optimizer_offload"],
        offload_policy=fsdp["offload_policy"] and strategy == "fsdp2",
        reshard=fsdp["reshard_after_forward"],
        no_sync=fsdp["use_no_sync_for_gradient_accumulation"],
        model_bytes=model_bytes,
        compute_bytes=DTYPE_BYTES[mixed.get("param_dtype", "bf16")],
        reduce_bytes=DTYPE_BYTES[mixed.get("reduce_dtype", "fp32")],
        adam_bytes=2 if "8bit" in str(s.get(f"{role.node}.optim.optimizer")) else 2 * model_bytes,
        train=train,
        infer=infer,
        checkpointing=bool(s.get(f"{role.model}.enable_gradient_checkpointing")),
        activation_offload=bool(s.get(f"{role.model}.enable_activation_offload")),
        remove_padding=bool(s.get(role.padding)),
        flash_attention="flash" in str(s.get(role.attention) or "flash_attention_2"),
        packable=not (s.is_given(role.attention) and s.get(role.attention) in MASKED),
        compiled=fsdp["use_torch_compile"],
        lora_rank=s.lora_rank(name),
        lora_targets=tuple(targets) if isinstance(targets, list) else None,
        **more,
    )


def _rollout(s: Settings) -> RolloutSettings:
    rollout = s.spec.rollout
    cache = KV_CACHES.get(rollout.kv_cache)
    return RolloutSettings(
        # a run with `rollout.mix` must fit on the GPUs of its bf16 replicas, which are larger
        precision="bf16" if rollout.mix else rollout.precision,
        tensor_parallel=rollout.tensor_parallel,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        max_model_len=rollout.max_model_len or s.spec.data.max_length,
        eager=rollout.enforce_eager,
        sleeps=bool(s.get(f"{ROLLOUT}.free_cache_engine")),
        kv_bytes=1 if cache else 2,
        kv_scale_bytes=cache.scale_bytes if cache else 0,
    )


SET_KEYS = {
    name: written(key)
    for name, key in {
        "remove_padding": ROLES["actor"].padding,
        "checkpointing": f"{MODEL}.enable_gradient_checkpointing",
        "fused_kernels": f"{MODEL}.use_fused_kernels",
        "optimizer_offload": f"{ACTOR}.fsdp_config.optimizer_offload",
        "param_offload": f"{ACTOR}.fsdp_config.param_offload",
        "offload_policy": f"{ACTOR}.fsdp_config.offload_policy",
        "micro_batch": UPDATE.micro,
        "token_budget": UPDATE.tokens,
        "log_prob_tokens": LOG_PROBS.tokens,
        "log_prob_micro_batch": LOG_PROBS.micro,
        "critic_optimizer_offload": "critic.fsdp.optimizer_offload",
        "critic_param_offload": "critic.fsdp.param_offload",
        "critic_tokens": CRITIC.tokens,
        "gpu_memory_utilization": f"{ROLLOUT}.gpu_memory_utilization",
        "tensor_parallel": TENSOR_PARALLEL,
        "max_num_batched_tokens": f"{ROLLOUT}.max_num_batched_tokens",
        "gpus_per_node": "trainer.n_gpus_per_node",
    }.items()
}
"""What can be changed to save memory, with the key that `--set` takes for it."""

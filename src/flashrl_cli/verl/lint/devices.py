"""Rules on devices: engines, sequence parallelism, sharding, Ray's logical resources, and machines without a GPU.

Cited lines are verl 0.9.1's unless another library is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashrl_cli.verl import attention
from flashrl_cli.verl.checkpoints import STORAGE_UNITS
from flashrl_cli.verl.config import (
    DATA_PARALLEL,
    DTYPE_BYTES,
    ROLES,
    TENSOR_PARALLEL,
    Rule,
    Settings,
    engine_devices,
    written,
)
from flashrl_cli.verl.environment import CPUS_A_DEVICE, CPUS_A_ROLLOUT_DEVICE, rollout_options
from flashrl_cli.verl.overrides import AUTO, RAY_CPUS, RAY_GPUS, ROLLOUT

if TYPE_CHECKING:
    from flashrl_cli.errors import Problem

BUCKET = f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes"


def trains_with_fsdp(s: Settings) -> Iterator[Problem]:
    """flashrl reads FSDP checkpoints only, and its pinned stacks lack the packages of other training engines.

    The layout of these checkpoints is that of utils/checkpoint/fsdp_checkpoint_manager.py:302.
    """
    for role in s.roles():
        strategy = s.get(ROLES[role].strategy)
        if strategy not in ("fsdp", "fsdp2") and (
            role != "reference policy" or strategy != s.get(ROLES["actor"].strategy)
        ):
            yield s.problem(
                f"the {role} trains with {strategy}; flashrl reads checkpoints of fsdp and fsdp2",
                "drop model_engine" if s.where("model_engine") else s.fix(ROLES[role].strategy, "fsdp2"),
                ROLES[role].strategy,
                "model_engine",
            )


def engines_fit_devices(s: Settings) -> Iterator[Problem]:
    """Rollout engines take all devices, each engine a part of one node or a number of full nodes.

    See workers/engine_workers.py:659 and workers/rollout/replica.py:114. verl assigns devices to engines in order, and
    would start an engine that spans two nodes as if all its devices were on the first.
    """
    resources, size = s.spec.resources, engine_devices(s.spec)
    nodes, node, field = resources.nodes, resources.gpus_per_node, "trainer.n_gpus_per_node"
    if resources.separate_devices:
        nodes, node = resources.rollout_nodes or 1, resources.rollout_gpus_per_node or 1
        field = f"{ROLLOUT}.n_gpus_per_node"
    if (node % size == 0) if size <= node else (size % node == 0 and nodes * node % size == 0):
        return
    width = size // s.spec.rollout.tensor_parallel
    fitting = [tp for tp in range(1, node + 1) if node % (tp * width) == 0 and tp <= s.spec.rollout.tensor_parallel]
    yield s.problem(
        f"engines of {size} devices do not fit {nodes} x {node} devices",
        s.fix(TENSOR_PARALLEL, max(fitting)) if fitting else s.fix(DATA_PARALLEL, 1),
        TENSOR_PARALLEL,
        DATA_PARALLEL,
        field,
    )


def engine_parallelism_is_supported(s: Settings) -> Iterator[Problem]:
    """verl refuses pipeline parallelism and some expert parallelism when it builds the rollout.

    The checks are in workers/config/rollout.py:281-322.
    """
    pipeline, experts = f"{ROLLOUT}.pipeline_model_parallel_size", f"{ROLLOUT}.expert_parallel_size"
    if (s.size(pipeline) or 1) > 1:
        yield s.problem(f"verl has no pipeline parallelism for vLLM: verl.{pipeline}", s.fix(pipeline, 1), pipeline)
    if (s.size(experts) or 1) > 1 and s.size(experts) != engine_devices(s.spec):
        yield s.problem(
            f"verl.{experts} = {s.get(experts)} is not "
            f"rollout.tensor_parallel x data_parallel_size = {engine_devices(s.spec)}",
            s.fix(experts, engine_devices(s.spec)),
            experts,
            TENSOR_PARALLEL,
        )
    if s.get(f"{ROLLOUT}.mode") == "sync":
        yield s.problem("verl has no synchronous rollout mode any more", f"drop verl.{ROLLOUT}.mode", f"{ROLLOUT}.mode")


def sequence_parallelism_fits(s: Settings) -> Iterator[Problem]:
    """Sequence parallelism needs a degree that divides the devices, unpadded input and flash attention.

    verl checks the first two when workers start (workers/engine/fsdp/transformer_impl.py:148, 247). It exchanges heads
    between devices in the flash-attention function only (models/transformers/monkey_patch.py:544); any other attention
    would attend within each device's part of a sequence only.
    """
    for role in s.roles():
        degree, keys = s.sequence_parallel(role), ROLES[role].sequence_parallel
        if degree == 1 or (role == "reference policy" and degree == s.sequence_parallel("actor")):
            continue
        key = next((key for key in keys if s.where(key)), keys[0])
        if s.devices % degree:
            fitting = max(d for d in range(1, min(degree, s.devices) + 1) if s.devices % d == 0)
            yield s.problem(
                f"{written(key)} = {degree} does not divide {s.devices} devices",
                s.fix(key, fitting),
                *keys,
            )
        if not s.get(ROLES[role].padding):
            yield s.problem(
                f"sequence parallelism of the {role} needs unpadded input",
                s.fix(ROLES[role].padding, True),
                ROLES[role].padding,
                *keys,
            )
        used = s.get(ROLES[role].attention) or attention.FLASH
        if not str(used).startswith("flash_attention"):
            yield s.problem(
                f"sequence parallelism of the {role} with {used} would attend within each device's part only",
                f"{_other_attention(s, role)}, or {s.fix(key, 1)}",
                ROLES[role].attention,
                *keys,
            )


def _other_attention(s: Settings, role: str, value: str = AUTO) -> str:
    """The option that replaces a role's attention, wherever it was set."""
    key = ROLES[role].attention
    if s.is_verbatim(key):
        return f"drop verl.+{key}"
    return s.option(attention.FIELD, value)


def attention_can_run(s: Settings) -> Iterator[Problem]:
    """FlashAttention needs CUDA, half precision and a head size that it has, `varlen` packed sequences as well.

    Otherwise workers end when they build or first call the model (plugins/attention.py, workers/config/model.py:185,
    transformers/modeling_utils.py:1700).
    """
    for role in s.roles():
        keys, used = ROLES[role], s.get(ROLES[role].attention)
        places = (keys.attention, attention.FIELD)
        if s.spec.resources.platform == "cpu":
            if used not in (None, attention.SDPA, "eager") and role != "reference policy":
                yield s.problem(f"{used} needs CUDA", _other_attention(s, role), *places)
            continue
        judge = {attention.VARLEN: attention.varlen_lacks, attention.FLASH: attention.flash_lacks}.get(used)
        if judge is None or s.sequence_parallel(role) > 1:
            continue
        shape = s.shape if role != "critic" or s.spec.critic.path in (None, s.spec.model.path) else None
        dtype = s.get(keys.compute_dtype) or attention.HALF[0]
        use = attention.Use(bool(s.get(keys.padding)), dtype, s.spec.data.max_length, shape)
        fixes = {
            "packing": s.fix(keys.padding, True),
            "dtype": s.fix(keys.compute_dtype, attention.HALF[0], new=True),
        }
        for lack in judge(use):
            if role != "reference policy" or lack.cause == "dtype":  # else it is the policy's, and reported of that
                hint = fixes.get(lack.cause, _other_attention(s, role))
                yield s.problem(f"{used} {lack.text}: the {role} cannot have it", hint, *places)


def critic_shares_sequences_by_its_engine(s: Settings) -> Iterator[Problem]:
    """verl never passes the critic's own key to its engine, unlike the actor's (workers/config/critic.py:212-220)."""
    key, living = "critic.ulysses_sequence_parallel_size", ROLES["critic"].sequence_parallel[0]
    if s.has_critic and (s.size(key) or 1) > 1:
        yield s.problem(f"verl does not act on {key}", f"{s.fix(living, s.get(key))} instead", key)


def heads_split(s: Settings) -> Iterator[Problem]:
    """The number of attention heads must be divisible by the number of devices that share them.

    Key-value heads are distributed evenly, or each is copied to equally many devices. For training see
    models/transformers/monkey_patch.py:343; for the engine vllm/config/model.py:1367 and
    vllm/model_executor/models/qwen2.py:139.
    """
    if s.shape is None:
        return
    same = s.spec.critic.path in (None, s.spec.model.path)
    degrees = [(s.spec.rollout.tensor_parallel, TENSOR_PARALLEL, "the engine")]
    for role in s.roles():
        key = next((k for k in ROLES[role].sequence_parallel if (s.size(k) or 1) > 1), ROLES[role].sequence_parallel[0])
        if role == "actor" or (role == "critic" and same):
            degrees.append((s.sequence_parallel(role), key, f"the {role}"))
    for degree, key, what in degrees:
        if not _split(s.shape.heads, s.shape.kv_heads, degree):
            fitting = max(
                d for d in range(1, degree) if _split(s.shape.heads, s.shape.kv_heads, d) and s.devices % d == 0
            )
            yield s.problem(
                f"{written(key)} = {degree}: {what} cannot split {s.shape.heads} heads "
                f"({s.shape.kv_heads} of keys and values)",
                s.fix(key, fitting),
                key,
            )


def _split(heads: int, kv_heads: int, degree: int) -> bool:
    return heads % degree == 0 and (kv_heads % degree == 0 or degree % kv_heads == 0)


def shards_fit_devices(s: Settings) -> Iterator[Problem]:
    """The FSDP size must divide the devices, or some have no place in the mesh (workers/engine/fsdp/utils.py:50)."""
    for role in s.roles():
        key = f"{ROLES[role].fsdp}.fsdp_size"
        size = s.size(key)
        if size is not None and (size == 0 or (0 < size < s.devices and s.devices % size)):
            yield s.problem(
                f"{written(key)} = {size} does not divide {s.devices} devices",
                f"{s.fix(key, -1)} (all devices)",
                key,
            )


def offload_policy_is_fsdp2s(s: Settings) -> Iterator[Problem]:
    """FSDP1 ignores `offload_policy`: the parameters would stay on the GPU.

    See workers/engine/fsdp/transformer_impl.py:423-449.
    """
    for role in s.roles():
        key = f"{ROLES[role].fsdp}.offload_policy"
        if role != "reference policy" and s.get(key) and s.get(ROLES[role].strategy) == "fsdp":
            yield s.problem(
                f"fsdp ignores {written(key)}",
                f"{s.fix(ROLES[role].strategy, 'fsdp2')}, or param_offload for fsdp",
                key,
            )


def cpus_needed(s: Settings) -> int:
    """Number of Ray CPUs that verl reserves on one node; with fewer it waits forever.

    These are three per device (single_controller/ray/base.py:146, 192), one each for the transfer queue's controller
    and storage units (transfer_queue/controller.py:943, storage/simple_storage.py:722), and those of the processes that
    the reward manager `remote` starts in each worker.
    """
    remote = (s.size("reward.num_workers") or 1) ** 2 if s.spec.reward.manager == "remote" else 0
    resources = s.spec.resources
    # an engine with devices of its own: two for each (workers/rollout/replica.py:205)
    separate = CPUS_A_ROLLOUT_DEVICE * (resources.rollout_gpus_per_node or 0)
    return CPUS_A_DEVICE * resources.gpus_per_node + separate + 1 + (s.size(STORAGE_UNITS) or 0) + remote


def ray_has_resources(s: Settings) -> Iterator[Problem]:
    """The numbers of CPUs and GPUs given to Ray must be enough for the run.

    With too few CPUs placement groups wait forever (single_controller/ray/base.py:160); too few GPUs are refused in a
    worker (:240). A Ray cluster that already runs accepts neither number (ray/_private/worker.py:1938).
    """
    cpus, gpus = s.size(RAY_CPUS), s.size(RAY_GPUS)
    if s.spec.resources.nodes > 1:
        for key in (RAY_CPUS, RAY_GPUS):
            if s.get(key) is not None:
                hint = s.fix(key, None, new=key == RAY_GPUS)
                yield s.problem(f"{key} cannot be given to a cluster of several nodes", hint, key)
        return
    if cpus is not None and cpus < cpus_needed(s):
        yield s.problem(
            f"{RAY_CPUS} = {cpus}: verl reserves {cpus_needed(s)} and would wait for ever",
            s.fix(RAY_CPUS, cpus_needed(s)),
            RAY_CPUS,
            "trainer.n_gpus_per_node",
        )
    needed = s.spec.resources.all_devices
    if gpus is not None and gpus < needed:
        fields = "resources.gpus_per_node" + (" and rollout_gpus_per_node" if s.spec.resources.separate_devices else "")
        yield s.problem(
            f"{RAY_GPUS} = {gpus} is less than {fields} = {needed}",
            f"{s.fix(RAY_GPUS, needed, new=True)}, or drop it",
            "trainer.n_gpus_per_node",
            RAY_GPUS,
        )


def cpu_gets_what_it_needs(s: Settings) -> Iterator[Problem]:
    """A run on CPUs needs FSDP2, and an engine that does not sleep.

    FSDP1 requires an accelerator (torch/distributed/fsdp/_init_utils.py:389); sleeping engines need CUDA. verl's
    defaults would fail in a worker (vllm/config/model.py:595).
    """
    if s.spec.resources.platform != "cpu":
        return
    wanted: list[tuple[str, tuple[object, ...], bool]]
    trained = [role for role in s.roles() if role != "reference policy"]
    wanted = [(ROLES[role].strategy, ("fsdp2",), False) for role in trained]
    wanted += [(f"{ROLLOUT}.free_cache_engine", (False,), False), (f"{ROLLOUT}.enable_sleep_mode", (False,), True)]
    for key, values, new in wanted:
        if s.get(key) not in values:
            yield s.problem(
                f"on cpu {written(key)} has to be {str(values[0]).lower()}",
                f"{s.fix(key, values[0], new=new and s.get(key) is None)}, or extends: [base/cpu]",
                key,
                "trainer.device",
            )


def buckets_hold_every_weight(s: Settings) -> Iterator[Problem]:
    """On a CPU weights travel through shared memory, where verl sends none that exceeds a bucket.

    See workers/rollout/vllm_rollout/bucketed_weight_transfer.py:141. Weights are sent in the trainer's dtype unless
    flashrl casts them to bf16 (plugins/transfer.py).
    """
    if s.spec.resources.platform != "cpu" or s.shape is None:
        return
    dtype = "bf16" if rollout_options(s.spec).bf16_transfer else s.get(f"{ROLES['actor'].fsdp}.model_dtype") or "fp32"
    largest = max(s.shape.vocab, s.shape.intermediate) * s.shape.hidden * DTYPE_BYTES[dtype]
    held, needed = s.get(BUCKET), math.ceil(largest / 2**20)
    if held < needed:
        yield s.problem(
            f"buckets of {held} MiB do not hold the largest weight of {s.spec.model.path}, {needed} MiB in {dtype}",
            s.fix(BUCKET, needed),
            BUCKET,
            "actor_rollout_ref.model.path",
        )


RULES: tuple[Rule, ...] = (
    engines_fit_devices,
    engine_parallelism_is_supported,
    sequence_parallelism_fits,
    attention_can_run,
    critic_shares_sequences_by_its_engine,
    heads_split,
    shards_fit_devices,
    offload_policy_is_fsdp2s,
    ray_has_resources,
    cpu_gets_what_it_needs,
    buckets_hold_every_weight,
)

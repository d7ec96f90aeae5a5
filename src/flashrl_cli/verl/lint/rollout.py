"""Rules on the rollout engine: lengths, arguments, precision, adapters, experts, validation.

Each reports what the engine would refuse, or accept and do otherwise. Cited lines are verl 0.9.1's unless vLLM is
named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from flashrl_cli import contract
from flashrl_cli.precision import BY_METHOD, KV_CACHES, PRECISIONS, WITH_EXPERTS, Precision, largest_block
from flashrl_cli.verl.config import (
    TENSOR_PARALLEL,
    Rule,
    Settings,
    bf16_replicas,
    engine_devices,
    replicas,
    written,
)
from flashrl_cli.verl.overrides import ACTOR, BACKEND, ENGINE, MODEL, NCCL, ROLLOUT, SEPARATE
from flashrl_cli.weights.shape import inputs

if TYPE_CHECKING:
    from flashrl_cli.errors import Problem
    from flashrl_cli.weights.shape import ModelShape

OVERRIDE_CONFIG = f"{MODEL}.override_config"
VALIDATION = f"{ROLLOUT}.val_kwargs"
SAME_NAME = (
    "dtype", "load_format", "max_model_len", "max_num_seqs", "enable_chunked_prefill", "max_num_batched_tokens",
    "enable_prefix_caching", "enable_sleep_mode", "logprobs_mode", "enforce_eager", "gpu_memory_utilization",
    "disable_log_stats", "seed", "scheduling_policy", "data_parallel_size",
)  # fmt: skip
ARGUMENTS = {name: f"{ROLLOUT}.{name}" for name in SAME_NAME} | {
    "tensor_parallel_size": TENSOR_PARALLEL,
    "pipeline_parallel_size": f"{ROLLOUT}.pipeline_model_parallel_size",
    "trust_remote_code": f"{MODEL}.trust_remote_code",
}
"""Arguments of the engine that verl sets from its own keys (workers/rollout/vllm_rollout/vllm_async_server.py:326).
"""
LARGEST_RANK = 512
BOUNDS: dict[str, tuple[Callable[[float], bool], float]] = {
    "temperature": (lambda t: t >= 0, 1.0),
    "top_p": (lambda p: 0 < p <= 1, 1.0),
    "top_k": (lambda k: k >= -1, -1),
    "n": (lambda n: n >= 1, 1),
}
"""Sampling options: a test of the values that vLLM accepts, and one such value for a hint."""
QUANTIZATIONS = ("fp8", "torchao", "ascend")
SENDING = (NCCL, contract.CHECKPOINT_ENGINE[0], "nixl", "mooncake", "kimi_ckpt_engine")
"""Backends that send the trainer's full tensors to engines on other GPUs."""


def positions_hold_a_sequence(s: Settings) -> Iterator[Problem]:
    """The engine's longest sequence may not exceed the model's positions.

    See workers/rollout/vllm_rollout/vllm_async_server.py:1107.
    """
    key = f"{OVERRIDE_CONFIG}.max_position_embeddings"
    held = s.size(f"{OVERRIDE_CONFIG}.model_config.max_position_embeddings") or s.size(key)
    held = held or (s.shape.max_positions if s.shape else None)
    asked = s.spec.rollout.max_model_len
    if held is not None and asked is not None and asked > held:
        response = held - s.spec.data.max_prompt_length
        yield s.problem(
            f"rollout.max_model_len = {asked} is more than the model's {held} positions",
            s.option("data.max_response_length", response)
            if response > 0
            else s.option("data.max_prompt_length", held // 2),
            f"{ROLLOUT}.max_model_len",
            "data.max_response_length",
            "data.max_prompt_length",
            f"{MODEL}.path",
        )


def engine_arguments_are_said_once(s: Settings) -> Iterator[Problem]:
    """Engine arguments given directly replace those from verl's keys, but verl itself goes on using its keys.

    See workers/rollout/vllm_rollout/vllm_async_server.py:349.
    """
    given = s.get(ENGINE) or {}
    for name in (name for name in given if "-" in str(name)):
        key = f"{ENGINE}.{name}"
        yield s.problem(
            f"verl.{key} would go around what is known of {name.replace('-', '_')}, which vLLM takes it for",
            f"write verl.+{ENGINE}.{name.replace('-', '_')}",
            key,
        )
    for name, key in ARGUMENTS.items():
        if name in given:
            yield s.problem(
                f"verl.{ENGINE}.{name} would silently win over {written(key)}",
                s.fix(key, given[name]),
                f"{ENGINE}.{name}",
            )


def blocks_keep_their_configuration(s: Settings) -> Iterator[Problem]:
    """verl passes the configuration of block-wise FP8 to vLLM as `hf_overrides`, which the same argument would replace.

    See workers/rollout/vllm_rollout/vllm_async_server.py:346-349.
    """
    overrides = s.get(f"{ENGINE}.hf_overrides")
    row = PRECISIONS[s.spec.rollout.precision]
    if row.vllm_config and overrides is not None:
        keys = [o.key for o in s.overrides if o.key.startswith(f"{ENGINE}.hf_overrides")]
        yield s.problem(
            f"verl.+{ENGINE}.hf_overrides would replace the configuration of {row.name} rollouts",
            f"--rollout {row.sibling}, or drop it",
            *keys,
        )


def quantization_is_known(s: Settings) -> Iterator[Problem]:
    """verl's engine refuses an unknown quantization when it starts; QAT replaces the configured precision.

    See workers/rollout/vllm_rollout/vllm_async_server.py:1216, 1241.
    """
    key = f"{ROLLOUT}.quantization"
    if s.get(key) is not None and s.get(key) not in QUANTIZATIONS:
        hint = "--rollout int8" if str(s.get(key)).startswith("int8") else f"one of {', '.join(QUANTIZATIONS)}"
        yield s.problem(f"verl has no rollout quantization {s.get(key)}", hint, key)
    trained, followed = f"{ACTOR}.fsdp_config.qat.enable", f"{ROLLOUT}.qat.enable"
    if s.get(followed) and s.spec.rollout.precision != "bf16":
        yield s.problem(
            "quantization-aware training decides the rollout's precision, "
            f"not rollout.precision = {s.spec.rollout.precision}",
            f"--rollout bf16, or {s.fix(trained, False)}",
            trained,
            followed,
        )


def experts_are_quantized(s: Settings) -> Iterator[Problem]:
    """Some of flashrl's methods quantize no experts, so nearly all weights of such a model would stay in bf16.

    These methods quantize linear layers only (plugins/linear.py).
    """
    row = PRECISIONS[s.spec.rollout.precision]
    if row.method and not row.experts and s.shape and s.shape.experts:
        yield s.problem(
            f"{row.name} rollouts would leave the {s.shape.experts} experts of {s.spec.model.path} in bf16",
            f"--rollout {WITH_EXPERTS[0]}",
            f"{ENGINE}.quantization",
            f"{MODEL}.path",
        )


def cache_bound_is_known(s: Settings) -> Iterator[Problem]:
    """An FP8 KV cache needs a model family for which flashrl knows a bound of keys and values.

    flashrl computes the cache's scales from this bound; for any other family the first refit fails
    (plugins/kv_scales.py).
    """
    cache = KV_CACHES.get(s.spec.rollout.kv_cache)
    if cache and cache.bounded and s.shape and s.shape.architecture not in contract.CACHE_FAMILIES:
        yield s.problem(
            f"an FP8 KV cache has no scales for a {s.shape.architecture} model, "
            f"only for {', '.join(contract.CACHE_FAMILIES)}",
            s.option("rollout.kv_cache", "auto"),
            "rollout.kv_cache",
            f"{MODEL}.path",
        )


def blocks_fill_shards(s: Settings) -> Iterator[Problem]:
    """Each device's part of a layer must consist of complete FP8 blocks of 128.

    Otherwise vLLM refuses to build or to run the layer: vllm/model_executor/layers/quantization/utils/fp8_utils.py:1193
    (linear layers) and :595 (their input), fp8.py:534 (experts). It accepts such parts in merged layers, but these then
    share the scale of a block, and the scale that is loaded last replaces the others (layers/linear.py:505).
    """
    tp, row = s.spec.rollout.tensor_parallel, PRECISIONS[s.spec.rollout.precision]
    if not row.block or s.shape is None or s.spec.resources.platform == "cpu":
        return
    whole = (s.size(f"{ROLLOUT}.expert_parallel_size") or 1) > 1
    broken = unfilled(row, s.shape, tp, whole_experts=whole)
    if broken:
        fitting = [d for d in range(1, tp) if tp % d == 0 and not unfilled(row, s.shape, d, whole_experts=whole)]
        yield s.problem(
            f"blocks of {row.block} ({row.name}) do not fill a device's part of {', '.join(broken)} "
            f"at rollout.tensor_parallel = {tp}",
            s.fix(TENSOR_PARALLEL, max(fitting)) if fitting else f"--rollout {row.sibling}",
            TENSOR_PARALLEL,
            f"{ROLLOUT}.quantization",
        )


def unfilled(row: Precision, shape: ModelShape, tp: int, *, whole_experts: bool = False) -> list[str]:
    """Names of the parts of a model that, on one of `tp` devices, do not consist of complete blocks of a precision."""
    return [what for what, width in _widths(shape, tp, whole_experts) if row.block and width % row.block]


def rotation_divides_inputs(s: Settings) -> Iterator[Problem]:
    """The blocks of a rotation must lie within a rank's part of each input (plugins/rotation.py)."""
    rollout = s.spec.rollout
    if not isinstance(rollout.rotation, int) or s.shape is None:
        return
    block, ranks = rollout.rotation, rollout.tensor_parallel
    for layer, width in inputs(s.shape, ranks).items():
        if width % block:
            rank = f" on each of {ranks} ranks" if ranks > 1 else ""
            fitting = largest_block(inputs(s.shape, ranks).values())
            yield s.problem(
                f"rollout.rotation = {block} does not divide the {width} input channels of {layer}{rank}",
                s.option("rollout.rotation", fitting or "off"),
                "rollout.rotation",
                TENSOR_PARALLEL,
                f"{MODEL}.path",
            )


def blocks_are_several(s: Settings) -> Iterator[Problem]:
    """Each layer's input must be wider than one FP8 block, or vLLM refuses the first weight update.

    The scales of such a layer have shape [rows, 1], of which verl drops the last dimension
    (verl/utils/vllm/vllm_quant_utils.py:396). verl quantizes complete weights, so the tensor-parallel degree does not
    matter.
    """
    row = PRECISIONS[s.spec.rollout.precision]
    if not row.block or s.shape is None or s.spec.resources.platform == "cpu":
        return
    if narrow := single(row, s.shape):
        yield s.problem(
            f"verl cannot load {row.number_format} blocks ({row.name}) into layers "
            f"whose input is one block of {row.block}: {', '.join(narrow)}",
            f"--rollout {row.sibling}",
            f"{ROLLOUT}.quantization",
            f"{MODEL}.path",
        )


def single(row: Precision, shape: ModelShape) -> list[str]:
    """Names of the inputs of a model's layers that are no wider than one block of a precision."""
    heads = ("the heads", shape.heads * shape.head_dim)
    mlp = ("the experts", shape.expert_intermediate) if shape.experts else ("the MLP", shape.intermediate)
    return [
        what for what, width in (("the hidden state", shape.hidden), heads, mlp) if row.block and width <= row.block
    ]


def _widths(shape: ModelShape, tp: int, whole_experts: bool) -> Iterator[tuple[str, int]]:
    """Yield the name and the width (rows or columns) of each type of layer on one of `tp` devices.

    Single key-value heads and the hidden state are never split.
    """
    yield "the hidden state", shape.hidden
    yield "the queries", shape.heads * shape.head_dim // tp
    yield "the keys", max(shape.kv_heads // tp, 1) * shape.head_dim
    if not shape.experts or shape.dense_layers:
        yield "the MLP", shape.intermediate // tp
    if shape.experts:
        yield "the experts", shape.expert_intermediate // (1 if whole_experts else tp)
    if shape.shared_intermediate:
        yield "the shared expert", shape.shared_intermediate // tp


def mix_leaves_both(s: Settings) -> Iterator[Problem]:
    """A mix must leave at least one replica in each precision.

    The plugins choose the precision by the number of the replica (plugins/linear.py).
    """
    mix, engines = s.spec.rollout.mix, replicas(s.spec)
    if not mix or bf16_replicas(s.spec) < engines:
        return
    precision = s.spec.rollout.precision
    if engines < 2:
        yield s.problem(
            f"rollout.mix = {mix:g} wants two replicas or more, and {s.spec.resources.rollout_devices} devices with "
            f"{engine_devices(s.spec)} an engine make {engines}",
            f"{s.option('rollout.mix', 0)}, or more devices",
            "rollout.mix",
            TENSOR_PARALLEL,
        )
        return
    yield s.problem(
        f"rollout.mix = {mix:g} would leave all {engines} replicas in bf16 and none in {precision}",
        s.option("rollout.mix", math.floor(1000 * (engines - 1) / engines) / 1000),
        "rollout.mix",
    )


def adapter_reaches_the_engine(s: Settings) -> Iterator[Problem]:
    """flashrl's worker extension refits complete weights only, so a LoRA adapter must be merged into them.

    The handshake then verifies those weights; the extension would not see a separate adapter (plugins/verl_refit.py).
    To engines with GPUs of their own verl sends the base model alone (workers/engine_workers.py:762).
    """
    merge, rank = f"{MODEL}.lora.merge", f"{MODEL}.lora_rank"
    if s.has_adapter and s.spec.trainer.mode == SEPARATE and not s.get(merge):
        yield s.problem(
            "verl sends no LoRA adapter to rollout engines with GPUs of their own, unless it is merged",
            s.fix(merge, True),
            merge,
            rank,
        )
        return
    if s.has_adapter and s.refits_with_flashrl and not s.get(merge):
        precision = s.spec.rollout.precision
        here = "rollouts on cpu" if s.spec.resources.platform == "cpu" else "rollouts with flashrl's weight update"
        what = f"{precision} rollouts" if precision in BY_METHOD else here
        yield s.problem(f"{what} take a LoRA adapter only when it is merged", s.fix(merge, True), merge, rank)


def blocks_quantize_the_base(s: Settings) -> Iterator[Problem]:
    """With an unmerged LoRA adapter, FP8 rollouts need an engine that starts with dummy weights.

    verl quantizes weights to FP8 when it sends them, and with an adapter it sends the base model only to an engine with
    dummy weights. Any other engine would read the bf16 files as if they were FP8, with scales that nothing sets
    (workers/engine_workers.py:673, 793).
    """
    merge, load = f"{MODEL}.lora.merge", f"{ROLLOUT}.load_format"
    row = PRECISIONS[s.spec.rollout.precision]
    if (
        row.verl
        and s.has_adapter
        and not s.get(merge)
        and "dummy" not in str(s.get(load))
        and s.spec.resources.platform == "cuda"
    ):
        yield s.problem(
            f"{row.name} rollouts would take the base model's bf16 files for {row.number_format}: "
            "verl syncs the adapter alone",
            s.fix(merge, True),
            load,
            f"{MODEL}.lora_rank",
        )


def adapter_is_well_formed(s: Settings) -> Iterator[Problem]:
    """LoRA under FSDP needs `lora_rank`, a rank that vLLM supports and, for `layered_summon`, loaded base weights.

    The largest rank is checked in workers/rollout/vllm_rollout/utils.py:97. `lora.rank` is Megatron's; FSDP reads
    `lora_rank` (workers/engine/fsdp/transformer_impl.py:162). `layered_summon` fails unless the engine has loaded the
    base model (utils/fsdp_utils.py:728).
    """
    rank, other, path = f"{MODEL}.lora_rank", f"{MODEL}.lora.rank", f"{MODEL}.lora_adapter_path"
    layered, load = f"{ROLLOUT}.layered_summon", f"{ROLLOUT}.load_format"
    if (s.size(other) or 0) > 0:
        yield s.problem(f"fsdp trains no adapter for verl.{other}", f"{s.fix(rank, s.get(other))} instead", other)
    if (s.size(rank) or 0) > LARGEST_RANK:
        yield s.problem(f"vLLM has no LoRA rank above {LARGEST_RANK}", s.fix(rank, LARGEST_RANK), rank)
    if s.get(path) and not s.has_adapter:
        yield s.problem(f"verl ignores verl.{path} without a rank", s.fix(rank, 32), path)
    if s.has_adapter and s.get(layered) and "dummy" in str(s.get(load)) and not s.get(f"{MODEL}.lora.merge"):
        yield s.problem(f"verl.{layered} presumes the base model in the engine", s.fix(load, "safetensors"), layered)


def routes_are_read(s: Settings) -> Iterator[Problem]:
    """Under FSDP the experts' routes that the engine returns are used for load-balance metrics only.

    FSDP does not replay routes (workers/engine_workers.py:498-505). verl skips the metrics with a warning if the engine
    returns no routes (trainer/ppo/metric_utils.py:304).
    """
    replay, interval = f"{ROLLOUT}.enable_rollout_routing_replay", f"{ROLLOUT}.moe_load_balance_metrics_interval"
    metrics = (s.size(interval) or 0) > 0
    if s.get(replay) and not metrics:
        yield s.problem(
            f"verl.{replay}: the FSDP trainer replays no routes, so that the engine would return them for nothing",
            s.fix(replay, False),
            replay,
        )
    if metrics and not s.get(replay):
        yield s.problem(
            f"verl.{interval} counts the routes that the engine returns, and it returns none",
            s.fix(replay, True),
            interval,
        )


def next_tokens_are_trained(s: Settings) -> Iterator[Problem]:
    """Multi-token prediction needs Megatron: verl's FSDP engine (workers/engine/fsdp) never reads `mtp`.

    The rollout engine starts with dummy weights and gets those of the trainer's model, which has no such layers, so
    drafts would be random (workers/rollout/vllm_rollout/utils.py:395). Without `enable`, verl ignores `enable_rollout`
    (workers/rollout/vllm_rollout/vllm_async_server.py:377).
    """
    for name in ("enable", "enable_rollout"):
        key = f"{MODEL}.mtp.{name}"
        if s.get(key):
            yield s.problem(
                f"verl.{key}: the FSDP trainer has no layers for multi-token prediction, "
                "so that the engine's get no weights",
                s.fix(key, False),
                key,
            )


def transfers_suit_the_mode(s: Settings) -> Iterator[Problem]:
    """Weights go directly to engines on the trainer's GPUs, and by a backend that sends full tensors to others.

    Where they go directly, whatever backend is configured (trainer/ppo/v1/trainer_base.py:382), each worker would
    create the other one without using it, or fail because its packages are missing (workers/engine_workers.py:686).
    `delta_sharded` sends changes only, by a method of the engine's worker that neither quantizes nor checks
    (workers/rollout/vllm_rollout/vllm_rollout.py:255).
    """
    backend = s.get(BACKEND)
    if s.spec.trainer.mode != SEPARATE:
        if backend != "naive":
            yield s.problem(
                f"verl.{BACKEND} = {backend} is for trainer.mode={SEPARATE}: weights are handed over directly here",
                s.fix(BACKEND, "naive"),
                BACKEND,
            )
        return
    sending = contract.CHECKPOINT_ENGINE[:1] if s.spec.resources.platform == "cpu" else SENDING
    if backend not in sending:
        why = {
            **dict.fromkeys(SENDING, "needs GPUs"),
            "naive": "hands weights over on one device, and the rollout engines have others",
            "delta_sharded": "sends changes past flashrl's weight update, which quantizes and checks",
        }.get(str(backend), "is no backend of verl's that flashrl knows to send full tensors")
        others = f", or one of {', '.join(sending)}" if len(sending) > 1 else ""
        yield s.problem(f"verl.{BACKEND} = {backend} {why}", f"drop it{others}", BACKEND)


def validation_samples(s: Settings) -> Iterator[Problem]:
    """Validation needs sampling options that vLLM accepts, and a temperature above 0 if responses are to differ.

    V1 samples at `val_kwargs.temperature` and does not read `do_sample` (trainer/ppo/v1/agent_loop_tq.py:74). With
    options outside vLLM's bounds every validation response fails (vllm/sampling_params.py:563-582).
    """
    for name, (holds, value) in BOUNDS.items():
        key = f"{VALIDATION}.{name}"
        given = s.get(key)
        if not isinstance(given, int | float) or not holds(given):
            yield s.problem(f"verl.{key} = {given} is nothing that vLLM samples with", s.fix(key, value), key)
    sampled, copies = f"{VALIDATION}.do_sample", f"{VALIDATION}.n"
    if s.get(f"{VALIDATION}.temperature") == 0 and (s.get(sampled) or (s.size(copies) or 1) > 1):
        yield s.problem(
            f"validation is greedy at verl.{VALIDATION}.temperature = 0: every response to a prompt would be the same",
            s.fix(f"{VALIDATION}.temperature", 1.0),
            copies if (s.size(copies) or 1) > 1 else sampled,
            f"{VALIDATION}.temperature",
        )


RULES: tuple[Rule, ...] = (
    positions_hold_a_sequence,
    engine_arguments_are_said_once,
    blocks_keep_their_configuration,
    quantization_is_known,
    experts_are_quantized,
    cache_bound_is_known,
    blocks_fill_shards,
    rotation_divides_inputs,
    blocks_are_several,
    mix_leaves_both,
    adapter_reaches_the_engine,
    blocks_quantize_the_base,
    adapter_is_well_formed,
    routes_are_read,
    next_tokens_are_trained,
    transfers_suit_the_mode,
    validation_samples,
)

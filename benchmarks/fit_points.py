"""Run one point of fit_on_gpu.py in a separate process: measure, estimate, compare, write.

python benchmarks/fit_points.py POINT OUT
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.bench.request import config_of
from flashrl_cli.memory import parts
from flashrl_cli.memory.model import QWEN25, shape_of
from flashrl_cli.memory.parts import model_of, total
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.verl.config import Batch, EngineSettings, RolloutSettings, TrainerSettings

if TYPE_CHECKING:
    from flashrl_cli.memory.parts import Item
    from flashrl_cli.weights.shape import ModelShape

UTILIZATION, SEQUENCES, BATCHED_TOKENS, MAX_LEN = 0.95, 256, 16384, 2048


class EngineFacts:
    """vLLM worker extension: reports the memory that the worker measured."""

    def fit_facts(self) -> dict[str, int | None]:
        import torch

        free, whole = torch.cuda.mem_get_info()
        names = ("available_kv_cache_memory_bytes", "peak_activation_memory", "non_torch_memory", "requested_memory")
        known = {name: getattr(self, name, None) for name in (*names, "total_consumed", "cudagraph_memory_estimate")}
        known["weights"] = getattr(self.model_runner, "model_memory_usage", None)  # type: ignore[attr-defined]
        return {"free": free, "total": whole, **known}


def shape(size: str) -> ModelShape:
    """Shape of a size, `7b`, or of its first layers, `7b/4`."""
    name, _, layers = size.partition("/")
    found = shape_of(f"Qwen/Qwen2.5-{name.upper()}", Path())
    assert found is not None, f"no shape {name}; there are {', '.join(QWEN25)}"
    return replace(found, layers=int(layers)) if layers else found


def engine_settings(precision: str) -> TrainerSettings:
    """A rollout on one GPU; of the trainer nothing counts here."""
    rollout = RolloutSettings(
        precision=precision,
        tensor_parallel=1,
        gpu_memory_utilization=UTILIZATION,
        max_num_seqs=SEQUENCES,
        max_num_batched_tokens=BATCHED_TOKENS,
        max_model_len=MAX_LEN,
    )
    return trainer_settings(EngineSettings(train=Batch(tokens=1), infer=Batch(tokens=1)), MAX_LEN, rollout)


def trainer_settings(actor: EngineSettings, length: int, rollout: RolloutSettings | None = None) -> TrainerSettings:
    """A run on one GPU whose micro-batches hold one sequence of `length` tokens."""
    anything = RolloutSettings(
        precision="bf16",
        tensor_parallel=1,
        gpu_memory_utilization=0.5,
        max_num_seqs=1,
        max_num_batched_tokens=length,
        max_model_len=length,
    )
    return TrainerSettings(
        nodes=1,
        gpus_per_node=1,
        prompt=length // 2,
        response=length - length // 2,
        train_batch=2,
        mini_batch=2,
        n=1,
        temperature=1.0,
        actor=actor,
        critic=None,
        reference=None,
        rollout=rollout or anything,
        bucket=2 << 30,
    )


def run_engine(size: str, precision: str, out: Path) -> None:
    """Start vLLM as verl does (sleep mode, CUDA graphs), and write its memory while it runs and while it sleeps."""
    settings = engine_settings(precision).rollout
    register()
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_of(shape(size))), encoding="utf-8")
        llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enable_sleep_mode=True,
            worker_extension_cls="fit_points.EngineFacts",
            disable_log_stats=True,
            **arguments(precision),
        )
    cache = llm.llm_engine.vllm_config.cache_config
    awake = llm.collective_rpc("fit_facts")[0]
    measured = {"kv_tokens": (cache.num_gpu_blocks or 0) * (cache.block_size or 0), **awake}
    found = parts.engine(shape(size), engine_settings(precision), awake["total"])
    estimated = {"weights": found.weights, "working": found.working, "kv_tokens": found.kv_tokens}
    result = compared(measured, estimated, ("weights", "kv_tokens"))
    files.write_json(out, result)
    llm.sleep(level=2)
    asleep = llm.collective_rpc("fit_facts")[0]
    measured["kept_asleep"] = asleep["total"] - asleep["free"]
    files.write_json(out, result)


def register() -> None:
    """flashrl's quantization methods, under their names; vLLM's plugin does it in runs of flashrl's only."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from flashrl_cli.plugins.linear import Fp8OnlineConfig, Int8OnlineConfig

    for method in (Int8OnlineConfig, Fp8OnlineConfig):
        register_quantization_config(method.get_name())(method)


def arguments(precision: str) -> dict[str, Any]:
    """Arguments of vLLM for a precision.

    Those of fp8-block are verl's (workers/rollout/vllm_rollout/vllm_async_server.py:1254).
    """
    row = PRECISIONS[precision]
    if row.vllm_config:
        return {"hf_overrides": {"quantization_config": dict(row.vllm_config)}}
    return {"quantization": row.method}


def compared(measured: dict[str, Any], estimated: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A measurement beside its estimate, sizes in bytes; `ratio` is estimated / measured."""
    import torch

    machine = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    if "vllm" in sys.modules:
        machine["vllm"] = sys.modules["vllm"].__version__
    ratio = {name: round(estimated[name] / measured[name], 4) if measured[name] else None for name in names}
    return {"ratio": ratio, "measured": measured, "estimated": estimated, "machine": machine}


def train_settings(strategy: str, count: int, kind: str) -> EngineSettings:
    """Settings of a training point, with flashrl's log-probs, since the machine need not have flash-attn."""
    return EngineSettings(
        strategy=strategy,
        train=Batch(tokens=count),
        infer=Batch(tokens=count),
        checkpointing=kind != "plain",
        fused_kernels=kind == "fused",
        flash_attention=False,
    )


def training_items(size: str, strategy: str, count: int, kind: str) -> tuple[Item, ...]:
    settings = trainer_settings(train_settings(strategy, count, kind), count)
    return parts.training(shape(size), model_of(shape(size), settings.actor, 1), settings, "actor")


def run_training(size: str, strategy: str, count: int, kind: str, out: Path) -> None:
    """Two updates of two micro-batches each; the second has Adam's states from the start. Writes peaks in bytes."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    model = sharded(build(shape(size), kind, device), strategy, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    peaks = {}
    for step in range(2):
        for micro in range(2):
            reset(device)
            loss(model, count, shape(size).vocab, kind, device).backward()
            peaks[f"step{step}.micro{micro}"] = peak(device)
        reset(device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        peaks[f"step{step}.adam"] = peak(device)
        optimizer.zero_grad()
    items = training_items(size, strategy, count, kind)
    estimated = {"peak": total(items), "items": {part.name: part.bytes for part in items}}
    files.write_json(
        out, compared({"peak": max(peaks.values()), "peaks": peaks, "log_probs": "chunks"}, estimated, ("peak",))
    )
    torch.distributed.destroy_process_group()


def build(found: ModelShape, kind: str, device: str) -> Any:
    """The policy in float32 with random weights, as verl makes it ready."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    wanted = {k: v for k, v in config_of(found).items() if k not in {"architectures", "model_type", "dtype"}}
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**wanted, attn_implementation="sdpa")).float()
    if kind != "plain":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if kind == "fused":
        from verl.models.transformers.dense_common import forward_with_torch_backend

        model.forward = forward_with_torch_backend.__get__(model)
    return model.train()


def sharded(model: Any, strategy: str, device: str) -> Any:
    """The model in verl's FSDP units: its layers, under FSDP2 an untied embedding and head, and the rest."""
    import functools

    import torch
    from torch.distributed import fsdp
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    layers = model.model.layers
    if strategy == "fsdp2":
        mesh = torch.distributed.device_mesh.init_device_mesh(device, (1,))
        policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        outside = () if model.config.tie_word_embeddings else (model.model.embed_tokens, model.lm_head)
        for unit in (*layers, *outside, model):
            fsdp.fully_shard(unit, mesh=mesh, mp_policy=policy)
        return model
    wrap = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(layers[0])})
    precision = fsdp.MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
    return fsdp.FullyShardedDataParallel(
        model, auto_wrap_policy=wrap, mixed_precision=precision, device_id=torch.cuda.current_device()
    )


def loss(model: Any, count: int, vocab: int, kind: str, device: str) -> Any:
    """A policy-gradient-like loss of one packed sequence of `count` tokens.

    Its logits are freed when this function returns, as in verl.
    """
    import torch

    from flashrl_cli.plugins.log_probs import log_probs

    ids = torch.randint(0, vocab, (1, count), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        position = torch.arange(count, device=device)[None]
        output = model(input_ids=ids, attention_mask=None, position_ids=position, use_cache=False, **wanted_of(kind))
        if kind == "fused":
            return -output.log_probs.mean()
        return -log_probs(output.logits.squeeze(0), torch.roll(ids, -1)[0]).mean()


def wanted_of(kind: str) -> dict[str, Any]:
    return {"return_dict": True, "temperature": 1.0} if kind == "fused" else {}


def reset(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int:
    import torch

    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else 0


def main(point: str, out: str) -> None:
    kind, size, *rest = point.split(":")
    if kind == "train":
        run_training(size, rest[0], int(rest[1]), rest[2], Path(out))
    else:
        run_engine(size, rest[0], Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])

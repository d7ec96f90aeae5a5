"""A trainer rank or an engine of weight_update.py; orders come on stdin, answers go to stdout.

python weight_update_parts.py trainer MODEL | engine MODEL PRECISION
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

BUCKET_MIB = 2048
"""verl's default (rollout.checkpoint_engine.update_weights_bucket_megabytes)."""


def answers() -> Any:
    """A function that writes to stdout, which libraries then no longer reach."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**data: Any) -> None:
        stream.write(json.dumps(data) + "\n")
        stream.flush()

    return answer


def sharded(model: str) -> Any:
    """The model on this rank's GPU, its parameters sharded in float32 over all ranks, with random values."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        found = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32)
    for layer in found.model.layers:
        fully_shard(layer)
    fully_shard(found)
    found.to_empty(device="cuda")
    torch.manual_seed(torch.distributed.get_rank())
    for parameter in found.parameters():
        parameter.data.to_local().normal_(0, 0.02)
    return found


def gathered(module: Any) -> Iterator[tuple[str, Any]]:
    """Full weights, as verl's engine gathers them for the rollout."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    engine: Any = object.__new__(FSDPEngine)
    engine.module = module
    engine._uses_fsdp2_cpu_offload_policy = engine._is_offload_param = engine._qat_enabled = False
    engine.model_config = SimpleNamespace(lora={}, hf_config=SimpleNamespace(model_type="qwen2"))
    weights: Iterator[tuple[str, Any]] = engine.get_per_tensor_param()[0]
    return weights


def trainer(model: str) -> None:
    import torch
    import torch.distributed as dist
    from verl.workers.engine.fsdp import transformer_impl
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    from flashrl_cli.plugins.transfer import InBf16

    answer = answers()
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    module = sharded(model)
    plain: Any = transformer_impl.convert_weight_keys

    def in_bf16(state: Mapping[str, Any], owner: Any) -> InBf16:
        return InBf16(plain(state, owner))

    answer(torch=torch.__version__, device=torch.cuda.get_device_name(), world=dist.get_world_size())
    for line in sys.stdin:
        transformer_impl.convert_weight_keys = in_bf16 if line.strip() == "bf16" else plain
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        started = time.perf_counter()
        replica = os.environ["VERL_REPLICA_RANK"]
        handle = f"ipc:///tmp/rl-colocate-zmq-0-replica-{replica}-rank-0.sock"
        with torch.no_grad():
            asyncio.run(BucketedWeightSender(handle, bucket_size_mb=BUCKET_MIB).async_send_weights(gathered(module)))
        answer(seconds=time.perf_counter() - started, peak_gib=torch.cuda.max_memory_allocated() / 2**30)


def engine(model: str, precision: str) -> None:
    import vllm
    from benchmarks.fit_points import arguments, register

    from flashrl_cli import contract

    answer = answers()
    options = arguments(precision)
    extension = contract.WORKER_EXTENSION
    if precision in {"bf16", "fp8-block"}:
        extension = "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension"
    else:
        register()
    if precision == "fp8-block":
        from verl.utils.vllm.vllm_quant_utils import apply_vllm_quant_patches

        options["quantization"] = "fp8"
        apply_vllm_quant_patches()
    started = time.perf_counter()
    llm = vllm.LLM(model=model, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True,
                   worker_extension_cls=extension, max_model_len=1024, max_num_seqs=8, kv_cache_memory_bytes=1 << 30,
                   gpu_memory_utilization=0.4, disable_log_stats=True, **options)  # fmt: skip
    answer(vllm=vllm.__version__, load_s=round(time.perf_counter() - started, 1))
    for line in sys.stdin:
        if line.strip() == "holds":
            folder = contract.plugin_dir()
            handshakes = list(contract.read_handshakes(folder)) if folder else []
            held = ("precision", "quantized_layers", "linear_layers", "refit_s", "received")
            answer(**({name: getattr(handshakes[0], name) for name in held} if handshakes else {}))
        else:
            llm.collective_rpc("update_weights_from_ipc")
            answer()


if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    (trainer if kind == "trainer" else engine)(*words)

"""Bytes a logit by which a process's peak grows in a pass of verl's own FSDP2 engine: what docs/memory-model.md counts.

    PYTHONPATH=src:SITE python benchmarks/logits_memory.py --out benchmarks/results/logits_memory_cpu.json

A policy that is all vocabulary, in bf16 on the CPU of a Linux machine, sequences packed and padded, with and without an
entropy and a temperature. flashrl's plugin is loaded as in a run.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 49152
LENGTHS = {"even": [256] * 8, "uneven": [512] + [219] * 7}
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "vocab_size": VOCABULARY,
}  # fmt: skip


def status(name: str) -> int:
    """A size of this process in bytes: VmRSS, what it has now, or VmHWM, the most that it had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def growth(work: Callable[[], object]) -> int:
    """Bytes by which the process's peak in a second call of `work` exceeds what it has before."""
    work()
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    work()
    return status("VmHWM") - before


def engine_of(folder: str, *, packed: bool) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    model = HFModelConfig(
        path=folder, load_tokenizer=False, use_remove_padding=packed, enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )  # fmt: skip
    precision = {"param_dtype": "bf16", "reduce_dtype": "fp32"}
    engine = EngineRegistry.new(
        model_type="language_model", backend="fsdp2", model_config=model,
        engine_config=FSDPEngineConfig(use_torch_compile=False, strategy="fsdp2", mixed_precision=precision),
        optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1), checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    engine.initialize()
    return engine


def batch_of(lengths: list[int], *, packed: bool, temperature: float, entropy: bool) -> Any:
    import torch
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    def nested(rows: list[Any]) -> Any:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    data = TensorDict(
        {
            "input_ids": nested([torch.randint(VOCABULARY, (length,)) for length in lengths]),
            "position_ids": nested([torch.arange(length) for length in lengths]),
            "loss_mask": nested([torch.ones(length, dtype=torch.long) for length in lengths]),
        },
        batch_size=[len(lengths)],
    )
    tensordict_utils.assign_non_tensor(
        data, temperature=temperature, calculate_entropy=entropy, use_remove_padding=packed, use_fused_kernels=False,
        use_dynamic_bsz=False, micro_batch_size_per_gpu=len(lengths), pad_token_id=0,
    )  # fmt: skip
    return data


def everything(model_output: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
    """A loss of all that the engine computes."""
    return sum(value.values().sum() for value in model_output.values()), {}


def passes(engine: Any, data: Any) -> dict[str, int]:
    def forward() -> None:
        with engine.eval_mode():
            engine.infer_batch(data.clone(), loss_function=None)

    def update() -> None:
        with engine.train_mode():
            engine.forward_backward_batch(data.clone(), everything)

    return {"log-probs": growth(forward), "update": growth(update)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    from flashrl_cli import contract, files
    from flashrl_cli.verl.environment import CPU

    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29612", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    folder = tempfile.mkdtemp()
    os.environ.update({**CPU, **alone, contract.ENV_PLUGIN_DIR: folder, contract.ENV_PLATFORM: "cpu"})
    import torch
    import transformers
    import verl

    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    report: dict[str, Any] = {
        "schema_version": 1,
        "what": "growth of a process's peak in a pass of verl's FSDP2 engine, in bytes a logit (padding included)",
        "versions": {"torch": torch.__version__, "verl": verl.__version__},
        "vocabulary": VOCABULARY,
        "cases": [],
    }
    for packed, kind in ((True, "even"), (False, "even"), (False, "uneven")):
        engine, lengths = engine_of(folder, packed=packed), LENGTHS[kind]
        computed = sum(lengths) if packed else len(lengths) * max(lengths)
        for temperature in (1.0, 0.7):
            for entropy in (False, True):
                data = batch_of(lengths, packed=packed, temperature=temperature, entropy=entropy)
                found = {name: round(size / computed / VOCABULARY, 2) for name, size in passes(engine, data).items()}
                case = {"packed": packed, "real": sum(lengths) / computed, "temperature": temperature}
                report["cases"].append({**case, "entropy": entropy, **found})
                files.write_json(given.out, report)
                print(report["cases"][-1], flush=True)


if __name__ == "__main__":
    main()

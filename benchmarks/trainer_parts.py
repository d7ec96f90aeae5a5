"""What the trainer's part of a step costs: verl's own FSDP engine in one process, without Ray, beside a bare PyTorch
loop.

    PYTHONPATH=.:src:SITE python benchmarks/trainer_parts.py --out FILE.json [--sequences 1024] [--only floor,packed]

A policy with SmolLM2-135M's shape and random weights on one GPU; log-probs (forward) and one update (forward, backward,
optimizer) of the same sequences of 150 to 330 tokens, which is about what GSM8K's questions and worked answers have.
Variants are named after what makes log-probs of logits:

- `loop`: verl's own without the flash-attn package, a Python loop over tokens (verl/utils/torch_functional.py:173);
- `chunked`: flashrl's, in chunks of tokens (src/flashrl_cli/plugins/log_probs.py);
- `fused`: verl's `use_fused_kernels` with the torch backend (verl/models/transformers/dense_common.py).

Packed sequences take `varlen`, flashrl's attention (plugins/attention.py). The floor is the same work without verl.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: TID253  (nothing here works without it)
from benchmarks import floors

from flashrl_cli.plugins import attention, log_probs

VOCABULARY = floors.SMOLLM2["vocab_size"]
Sequences = list[list[int]]
Measured = dict[str, Any]


def timed(work: Callable[[], None], repeats: int) -> Measured:
    """Seconds of each of `repeats` times, and the most GPU memory of them."""
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - began, 3))
    return {"seconds": seconds, "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def floor(folder: Path, sequences: Sequences, budget: int) -> Measured:
    """The bare loop of benchmarks.floors, with one mini-batch of these sequences."""
    file = folder / "samples.jsonl"
    floors.write_samples(file, [floors.Sample(one[:1], one[1:]) for one in sequences])
    job = floors.TrainerJob(model=str(folder), samples=str(file), mini_batches=1, budget=budget)
    found = floors.trainer(job)
    parts = {"log-probs": found["log-probs"], "update": found["actor"]}
    return {name: {"seconds": part["values"], "peak_gib": part["peak_gib"]} for name, part in parts.items()}


def engine_of(folder: Path, *, fused: bool) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    attention.register()
    model = HFModelConfig(
        path=str(folder), load_tokenizer=False, use_remove_padding=True, enable_gradient_checkpointing=False,
        use_fused_kernels=fused, fused_kernel_options={"impl_backend": "torch"} if fused else {},
        override_config={"attn_implementation": "varlen"},
    )  # fmt: skip
    engine = EngineRegistry.new(
        model_type="language_model", backend="fsdp2", model_config=model,
        engine_config=FSDPEngineConfig(use_torch_compile=False, strategy="fsdp2"),
        optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=100), checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    engine.initialize()
    return engine


def batch(sequences: Sequences, budget: int, *, fused: bool) -> Any:
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    data = TensorDict(
        {
            "input_ids": nested([torch.tensor(one) for one in sequences]),
            "position_ids": nested([torch.arange(len(one)) for one in sequences]),
            "loss_mask": nested([torch.ones(len(one), dtype=torch.long) for one in sequences]),
        },
        batch_size=[len(sequences)],
    )
    settings = {"use_remove_padding": True, "use_fused_kernels": fused, "use_dynamic_bsz": True, "pad_token_id": 0}
    tensordict_utils.assign_non_tensor(
        data, temperature=1.0, calculate_entropy=False, max_token_len_per_gpu=budget, **settings
    )
    return data


def negative_mean(model_output: Any, data: Any, **_: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    return -model_output["log_probs"].values().sum() / data["batch_num_tokens"], {}


def by_verl(engine: Any, sequences: Sequences, budget: int, *, fused: bool, repeats: int) -> Measured:
    def infer() -> None:
        with engine.eval_mode():
            engine.infer_batch(batch(sequences, budget, fused=fused), loss_function=None)

    def train() -> None:
        with engine.train_mode():
            engine.train_batch(batch(sequences, budget, fused=fused), loss_function=negative_mean)

    return {"log-probs": timed(infer, repeats), "update": timed(train, repeats)}


def variants(folder: Path, sequences: Sequences) -> dict[str, Callable[[], dict[str, Measured]]]:
    import verl.workers.engine.fsdp.transformer_impl as verls

    def packed() -> dict[str, Measured]:
        engine = engine_of(folder, fused=False)
        found = {"loop, 16k tokens": by_verl(engine, sequences, 16384, fused=False, repeats=1)}
        verls.logprobs_from_logits = log_probs.log_probs
        for budget in (16384, 32768):
            name = f"chunked, {budget >> 10}k tokens"
            found[name] = by_verl(engine, sequences, budget, fused=False, repeats=3)
        return found

    def fused() -> dict[str, Measured]:
        engine = engine_of(folder, fused=True)
        return {
            f"fused, {budget >> 10}k tokens": by_verl(engine, sequences, budget, fused=True, repeats=3)
            for budget in (16384, 32768)
        }

    return {
        "floor": lambda: {
            f"floor, {budget >> 10}k tokens": floor(folder, sequences, budget) for budget in (16384, 32768)
        },
        "fused": fused,
        "packed": packed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument(
        "--only", default="floor,packed,fused", help="fused last: verl changes the model's class for it"
    )
    given = parser.parse_args()

    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.update(alone)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
    import transformers
    import verl

    draw = random.Random(0)
    sequences = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(150, 330))] for _ in range(given.sequences)]
    report = {
        "schema_version": 1,
        "what": (
            "the trainer's part of a step: log-probs and one update of packed sequences, by verl and by a bare loop"
        ),
        "model": "SmolLM2-135M's shape, random weights",
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "verl": verl.__version__},
        "sequences": len(sequences),
        "tokens": sum(map(len, sequences)),
        "variants": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**floors.SMOLLM2))
        model.to(torch.bfloat16).save_pretrained(folder)
        made = variants(Path(folder), sequences)
        for name in given.only.split(","):
            report["variants"] |= made[name]()
            given.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            gc.collect()
            torch.cuda.empty_cache()
    print(json.dumps(report["variants"], indent=2))


if __name__ == "__main__":
    main()

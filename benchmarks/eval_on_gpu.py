"""Measure how the evaluation engine loads checkpoints on a GPU, and compare its answers with a fresh engine's.

    PYTHONPATH=src:SITE python benchmarks/eval_on_gpu.py [--out benchmarks/results/eval_on_gpu.json] \\
        [--sizes 0.5b,7b] [PATTERN...]

It measures the seconds and the memory of loading a checkpoint from disk. For each size of Qwen2.5 two checkpoints with
different weights are made: a float32 shard as verl saves it for one rank (all of the model, which is the most there is
to read), and a bf16 folder. One engine loads both alternately, each twice. PATTERNs name checkpoints of a policy that
adds: they are loaded in the same way in each of --rollouts, with greedy answers, and then each by a separate engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flashrl_cli import files
from flashrl_cli.evals import job as child
from flashrl_cli.evals import results
from flashrl_cli.evals.job import EngineSettings, Job, Order, Sampling
from flashrl_cli.evals.questions import Question
from flashrl_cli.runs.checkpoints import find
from flashrl_cli.weights import Weights

if TYPE_CHECKING:
    from flashrl_cli.worker.client import Worker

SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip
VOCABULARY = {"0.5b": 151936, "7b": 152064}
ENVIRONMENT = {
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "GLOO_SOCKET_IFNAME": "lo",
}
MAX_TOKENS = 16


def config(size: str) -> Any:
    """The configuration of a size."""
    from transformers import Qwen2Config

    more = {"vocab_size": VOCABULARY[size], "max_position_embeddings": 4096, "architectures": ["Qwen2ForCausalLM"]}
    return Qwen2Config(**SHAPES[size], **more)


def make(size: str, seed: int, folder: Path, tokenizer: Path, *, shard: bool) -> Weights:
    """Random weights in `folder`: float32 in a shard, or bf16 in safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2ForCausalLM

    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    made = config(size)
    made.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(made)
    torch.manual_seed(seed)
    tensors = {}
    for name, meta in model.state_dict().items():
        if name == "lm_head.weight" and made.tie_word_embeddings:
            continue
        drawn = torch.randn(meta.shape, device="cuda") * (0.02 if meta.dim() > 1 else 0.1)
        drawn = drawn + 1 if "norm" in name else drawn
        tensors[name] = (drawn if shard else drawn.bfloat16()).cpu()
    torch.cuda.empty_cache()
    if shard:
        torch.save(tensors, folder / "model_world_size_1_rank_0.pt")
        return Weights(hf=folder, shards=(folder / "model_world_size_1_rank_0.pt",))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Weights(hf=folder)


class Memory:
    """Peaks in GiB of a process tree's anonymous memory and of the GPU's memory.

    Memory is sampled ten times a second while the context is open.
    """

    def __init__(self, pid: int) -> None:
        self._pid, self._over = pid, threading.Event()
        self.anonymous = self.gpu = 0.0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(0.1):
            self.anonymous = max(self.anonymous, _anonymous(self._pid))
            self.gpu = max(self.gpu, _gpu())

    def peaks(self) -> dict[str, float]:
        return {"anonymous_gib": round(self.anonymous, 2), "gpu_gib": round(self.gpu, 2)}


def _anonymous(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) / 2**20
    return 0.0


def _gpu() -> float:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return float(subprocess.run(query, capture_output=True, encoding="utf-8", check=True).stdout.split()[0]) / 1024


@contextlib.contextmanager
def engine(start: Path, questions: Sequence[Question], rollout: str, log: Path) -> Iterator[tuple[Worker, Job, int]]:
    with tempfile.TemporaryDirectory() as work:
        job = Job(
            start=start,
            quantized=None,
            work=Path(work),
            data_sets=1,
            sampling=Sampling(max_tokens=MAX_TOKENS),
            engine=EngineSettings(rollout=rollout, gpu_memory_utilization=0.6),
        )
        job.write_questions(0, questions)
        with child.engine(job, log) as running:
            yield running, job, running.pid


def take(running: Worker, job: Job, weights: Weights, name: str) -> tuple[dict[str, Any], list[str]]:
    """Seconds to load and to answer, and the answers."""
    file = job.work / f"{name}.jsonl"
    file.unlink(missing_ok=True)
    count = job.questions(0).read_text(encoding="utf-8").count("\n")
    order = Order(weights=weights, data=0, answers=file, questions=tuple(range(count)))
    started = loaded = time.monotonic()
    holds: dict[str, Any] = {}
    for event in running.ask(order.plain()):
        if event["event"] == "skipped":
            raise SystemExit(event["reason"])
        if event["event"] == "loaded":
            loaded, holds = time.monotonic(), event["holds"]
    found = results.read_answers(file)
    seconds = {
        "until_loaded_s": round(loaded - started, 3),
        "refit_s": holds["refit_s"],
        "precision": holds["precision"],
    }
    return seconds, [found[number][0].response for number in sorted(found)]


def measure(
    both: Sequence[Weights], questions: Sequence[Question], rollout: str, log: Path, *, alone: bool
) -> dict[str, Any]:
    """One engine for all, in turn and twice; then, where `alone`, a fresh one for each."""
    rounds, again = [], []
    with engine(both[0].hf, questions, rollout, log) as (running, job, pid), Memory(pid) as memory:
        for number in range(2):
            for which, weights in enumerate(both):
                seconds, said = take(running, job, weights, f"{number}-{which}")
                rounds.append({"checkpoint": which, **seconds})
                again.append(said)
        peaks = memory.peaks()
    count = len(both)
    found = {
        "rollout": rollout,
        "rounds": rounds,  # the first includes the engine's start
        "peaks": peaks,
        "same_again": again[:count] == again[count:],
        "all_different": len(set(map(tuple, again))) == count,
    }
    if not alone:
        return found
    fresh = []
    for weights in both:
        with engine(weights.hf, questions, rollout, log) as (running, job, _):
            fresh.append(take(running, job, weights, "fresh")[1])
    return {**found, "as_fresh": again[count:] == fresh, "right": [_right(questions, said) for said in fresh]}


def _right(questions: Sequence[Question], said: Sequence[str]) -> float:
    pairs = zip(questions, said, strict=True)
    return sum(text.endswith(f"#### {question.ground_truth}") for question, text in pairs) / len(said)


def sums(count: int) -> list[Question]:
    """Questions as `prepare tiny` asks them."""
    pairs = [(7 * i % 90 + 5, 11 * i % 80 + 9) for i in range(count)]
    asked = ((f"What is {a} plus {b}?", str(a + b)) for a, b in pairs)
    return [Question([{"role": "user", "content": text}], "openai/gsm8k", truth, None) for text, truth in asked]


def main() -> None:
    """Measure all that was asked for, each result written as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eval_on_gpu.json"))
    parser.add_argument("--sizes", default="0.5b,7b")
    parser.add_argument("--rollouts", default="bf16,int8,fp8")
    parser.add_argument("--tokenizer", type=Path, required=True, help="An HF folder whose tokenizer is taken.")
    args = parser.parse_args()
    os.environ |= ENVIRONMENT
    import torch
    import vllm

    result: dict[str, Any] = {
        "command": f"python benchmarks/eval_on_gpu.py --sizes {args.sizes} --rollouts {args.rollouts} PATTERN",
        "device": torch.cuda.get_device_name(0),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "results": [],
    }
    log, questions = args.out.with_suffix(".log"), sums(64)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.patterns:
        knowing = [one.weights for one in find(args.patterns).checkpoints]
        for rollout in args.rollouts.split(","):
            result["results"].append({"policy": "tiny", **measure(knowing, questions, rollout, log, alone=True)})
            files.write_json(args.out, result)
    for size in [size for size in args.sizes.split(",") if size]:
        with tempfile.TemporaryDirectory() as folder:
            shard, whole = (make(size, n, Path(folder) / str(n), args.tokenizer, shard=n == 0) for n in range(2))
            bytes_read = [
                sum(file.stat().st_size for file in (*w.shards, *w.hf.glob("*.safetensors"))) for w in (shard, whole)
            ]
            found = measure([shard, whole], questions[:8], "bf16", log, alone=False)
            result["results"].append({"policy": size, "gib": [round(b / 2**30, 2) for b in bytes_read], **found})
            files.write_json(args.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

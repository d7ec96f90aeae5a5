"""Log-probs and entropies of logits: verl's own functions without the flash-attn package, and flashrl's in chunks.

    PYTHONPATH=src:SITE python benchmarks/log_probs.py --out benchmarks/results/log_probs_cpu.json [--device cuda]
        [--chunks 4,64] [--compile]

Seconds of a pass without gradients and of one with them for a number of tokens, and the largest error against float64.
The ways take turns and the least of their rounds counts: CPU seconds of one thread on a CPU, which other work on the
machine disturbs little, and the time between two events on a GPU. `--chunks` measures chunks of other sizes (MiB of
float32) as well, `--compile` flashrl's arithmetic on all tokens at once, compiled by torch.compile.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: TID253  (nothing here works without it)

from flashrl_cli import contract, files
from flashrl_cli.plugins import log_probs

TOKENS = {"cpu": {259: 4096, 49152: 256, 151936: 96}, "cuda": {49152: 16384, 151936: 16384}}
"""Tokens for each size of a vocabulary: that of the tiny policy's bytes, SmolLM2's and Qwen2.5's."""
ROUNDS = {"cpu": 5, "cuda": 3}
MIB = 1 << 20
Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ways_of(name: str, others: list[int], *, compiled: bool) -> dict[str, Way]:
    """What computes `name` (`log_probs` or `entropy`) of logits and labels."""
    import verl.utils.torch_functional as verls

    def chunks(size: int) -> Way:
        def way(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            contract.LOG_PROBS_CHUNK = contract.LOG_PROBS_CHUNK_CPU = size
            return (
                log_probs.log_probs(logits, labels, inplace_backward=False)
                if name == "log_probs"
                else log_probs.entropy(logits)
            )

        return way

    own: dict[str, Way] = {
        "log_probs": verls.logprobs_from_logits_v2,
        "entropy": lambda logits, _: verls.entropy_from_logits(logits.float()),
    }
    usual = contract.LOG_PROBS_CHUNK_CPU if DEVICE == "cpu" else contract.LOG_PROBS_CHUNK
    ways = {"verl": own[name], "chunks": chunks(usual)}
    ways |= {f"chunks of {size} MiB": chunks(size * MIB) for size in others}
    if compiled:
        plain: dict[str, Way] = {
            "log_probs": lambda z, y: z.float().log_softmax(-1).gather(-1, y[:, None])[:, 0],
            "entropy": lambda z, _: torch.logsumexp(z.float(), -1) - (z.float().softmax(-1) * z.float()).sum(-1),
        }
        ways["compiled"] = torch.compile(plain[name], dynamic=True)
    return ways


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of `work` on a CPU, or its seconds on the GPU."""
    if DEVICE == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def passes(way: Way, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Seconds of a pass without gradients, and of one with them."""

    def update() -> None:
        logits.grad = None
        way(logits, labels).sum().backward()

    with torch.no_grad():
        forward = seconds(lambda: way(logits, labels))
    return {"forward": forward, "forward and backward": seconds(update)}


def error(way: Way, name: str, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Largest difference of some tokens from float64."""
    with torch.no_grad():
        exact = torch.distributions.Categorical(logits=logits[:64].double())
        right = exact.log_prob(labels[:64]) if name == "log_probs" else exact.entropy()
        return float((way(logits[:64], labels[:64]) - right).abs().max())


def measured(vocabulary: int, count: int, dtype: torch.dtype, given: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    logits = (4 * torch.randn(count, vocabulary, device=DEVICE)).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (count,), device=DEVICE)
    found: dict[str, Any] = {}
    for name in ("log_probs", "entropy"):
        ways = ways_of(name, given.chunks, compiled=given.compile)
        rounds = [
            {label: passes(way, logits, labels) for label, way in ways.items()} for _ in range(1 + ROUNDS[DEVICE])
        ]
        found[name] = {
            label: {
                **{part: round(min(one[label][part] for one in rounds[1:]), 5) for part in rounds[0][label]},
                "first": round(rounds[0][label]["forward"], 5),
                "error": error(way, name, logits, labels),
            }
            for label, way in ways.items()
        }
    return {"vocabulary": vocabulary, "tokens": count, "dtype": str(dtype).removeprefix("torch."), **found}


def main() -> None:
    global DEVICE  # noqa: PLW0603
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=TOKENS, default="cpu")
    parser.add_argument("--chunks", type=lambda text: [int(one) for one in text.split(",")], default=[])
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    DEVICE = given.device
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "schema_version": 1,
        "what": "log-probs and entropies of logits, by verl without flash-attn and in flashrl's chunks",
        "unit": "CPU seconds of one thread" if DEVICE == "cpu" else "seconds on the GPU",
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "processors": os.cpu_count(),
        "torch": torch.__version__,
        "chunk_mib": (contract.LOG_PROBS_CHUNK_CPU if DEVICE == "cpu" else contract.LOG_PROBS_CHUNK) / MIB,
        "cases": [],
    }
    for vocabulary, count in TOKENS[DEVICE].items():
        for dtype in (torch.float32, torch.bfloat16):
            report["cases"].append(measured(vocabulary, count, dtype, given))
            files.write_json(given.out, report)
            print(report["cases"][-1], flush=True)


DEVICE = "cpu"
if __name__ == "__main__":
    main()

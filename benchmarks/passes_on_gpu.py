"""Tokens a second of log-probs and updates by the length of a pass, with and without recomputation, on one GPU.

    PYTHONPATH=src python -m benchmarks.passes_on_gpu --out passes_on_gpu.json

It decides what `auto` prefers (`flashrl_cli.memory.budget`): whether passes that keep their activations are faster than
longer ones that compute them again, and from which length on a longer pass gains nothing. The loop is that of
`benchmarks.floors`: packed sequences of 512 tokens, without verl. On a CPU it shows that the script works.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.floors import Loop, Sample, TrainerJob, drawn, gpu, write_model, write_samples

from flashrl_cli import files

LENGTHS = (256, 256)
"""Tokens of a prompt and of its response."""


def measure(shape: str, tokens: Sequence[int], folder: Path, repeats: int) -> list[dict[str, Any]]:
    """A row for each length of a pass, without and with recomputation; `seconds` is None where memory runs out."""
    import torch

    model, samples = folder / "model", folder / "samples.jsonl"
    parameters = write_model(shape, model)["parameters"]
    write_samples(samples, _sequences(max(tokens)))
    job = TrainerJob(model=str(model), samples=str(samples), mini_batches=1, repeats=repeats)
    loop = Loop(job, "cuda" if torch.cuda.is_available() else "cpu", 0)
    rows: list[dict[str, Any]] = []
    for recompute in (False, True):
        if recompute:
            loop.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for budget in tokens:
            row: dict[str, Any] = {"shape": shape, "parameters": parameters, "recompute": recompute, "tokens": budget}
            try:
                found = loop.measured(budget)
            except torch.OutOfMemoryError:
                rows.append(row | {"log-probs": None, "actor": None})
                loop.forget()
                break
            rows.append(row | {part: found[part] for part in ("log-probs", "actor")})
            print(shape, budget, recompute, found["log-probs"]["tokens_s"], found["actor"]["tokens_s"], flush=True)
    return rows


def _sequences(most: int) -> list[Sample]:
    """Twice as many tokens as the longest pass has, so that each length makes at least two passes."""
    count = max(2, 2 * most // sum(LENGTHS))
    return drawn([LENGTHS] * count, 256)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", default="smollm2,0.5b,1.5b,7b/8", help="default: %(default)s")
    parser.add_argument("--tokens", default="1024,2048,4096,8192,16384,32768", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args(arguments)
    import torch

    device = gpu() if torch.cuda.is_available() else "CPU"
    document: dict[str, Any] = {"schema_version": 1, "gpu": device, "lengths": LENGTHS, "rows": []}
    for shape in asked.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            lengths = [int(text) for text in asked.tokens.split(",")]
            document["rows"] += measure(shape, lengths, Path(folder), asked.repeats)
        files.write_json(asked.out, document)


if __name__ == "__main__":
    main()

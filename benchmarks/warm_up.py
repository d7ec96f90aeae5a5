"""Teach a small base model the worked answers of a data set, so that reinforcement learning has something to improve.

    python benchmarks/warm_up.py MODEL OUT --data ~/data/gsm8k/train.parquet [--epochs 3] [--lr 3e-4] [--limit N]

Plain supervised learning in PyTorch, on a GPU if there is one: each prompt as its chat template writes it, then GSM8K's
own solution without its calculator annotations (`<<48/2=24>>`), which ends in `#### 72` as verl's scorer demands. The
loss is that of the answer's tokens. Rows of similar length share a micro-batch, so that little is padded. Float32
weights, bf16 autocast, AdamW; order and algorithms are deterministic, so that the same GPU makes the same weights
again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrl_cli import files

_ANNOTATION = re.compile(r"<<[^<>]*>>")
IGNORED = -100
"""Label of a token that has no loss."""
WARM_UP_STEPS = 20


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and of its answer."""

    prompt: Sequence[int]
    answer: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def examples(data: Path, tokenizer: Any, longest: int, limit: int | None) -> Iterator[Example]:
    """Yield the rows of a prepared file that have a worked answer and at most `longest` tokens."""
    import pyarrow.parquet as pq

    for row in pq.read_table(data).to_pylist()[:limit]:
        text = _ANNOTATION.sub("", row["extra_info"]["answer"])
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        one = Example(
            tokenizer(prompt, add_special_tokens=False)["input_ids"],
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
        )
        if len(one) <= longest:
            yield one


def batches(found: Sequence[Example], size: int, micro: int, dice: random.Random) -> Iterator[list[list[Example]]]:
    """Yield batches of `size` examples in random order, each cut into micro-batches of similar lengths."""
    order = list(found)
    dice.shuffle(order)
    for start in range(0, len(order) - size + 1, size):
        batch = sorted(order[start : start + size], key=len)
        yield [batch[first : first + micro] for first in range(0, size, micro)]


def tensors(micro: Sequence[Example], padding: int, device: str) -> tuple[Any, Any, Any]:
    """Token ids, attention mask and labels of a micro-batch, padded on the right."""
    import torch

    longest = max(map(len, micro))
    ids = torch.full((len(micro), longest), padding)
    mask = torch.zeros((len(micro), longest), dtype=torch.long)
    labels = torch.full((len(micro), longest), IGNORED)
    for place, one in enumerate(micro):
        ids[place, : len(one)] = torch.tensor([*one.prompt, *one.answer])
        mask[place, : len(one)] = 1
        labels[place, len(one.prompt) : len(one)] = torch.tensor(one.answer)
    return ids.to(device), mask.to(device), labels.to(device)


def loss_of(model: Any, micro: Sequence[Example], padding: int, device: str) -> Any:
    """Sum of the negative log-probs of the answers' tokens, nats."""
    import torch
    from torch.nn import functional

    ids, mask, labels = tensors(micro, padding, device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # slower than float32 on most CPUs
        logits = model(input_ids=ids, attention_mask=mask).logits
    # float32 logits of the answers alone: a prompt's would cost as much memory and have no loss
    counted = labels[:, 1:] != IGNORED
    return functional.cross_entropy(logits[:, :-1][counted].float(), labels[:, 1:][counted], reduction="sum")


def train(model: Any, found: Sequence[Example], padding: int, device: str, given: argparse.Namespace) -> float:
    """Train in place for `given.epochs`; returns the last epoch's loss in nats a token."""
    import torch

    steps = given.epochs * (len(found) // given.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.1, 1 - step / steps)
    )
    dice, started, done, mean = random.Random(given.seed), time.monotonic(), 0, 0.0
    for epoch in range(given.epochs):
        total = tokens = 0.0
        for batch in batches(found, given.batch, given.micro, dice):
            count = sum(len(one.answer) for micro in batch for one in micro)
            for micro in batch:
                loss = loss_of(model, micro, padding, device)
                (loss / count).backward()
                total += loss.item()
            tokens += count
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
        mean = total / tokens
        print(f"epoch {epoch + 1}: step {done}, loss {mean:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face id or folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="train.parquet of `flashrl prepare gsm8k`")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=64, help="examples an optimizer step")
    parser.add_argument("--micro", type=int, default=32, help="examples a forward pass")
    parser.add_argument("--longest", type=int, default=512, help="tokens of prompt and answer together")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it only
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(given.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    found = list(examples(given.data, tokenizer, given.longest, given.limit))
    print(f"{len(found):,} examples, {sum(len(one.answer) for one in found) / len(found):.0f} tokens an answer")
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).to(device).train()
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    started = time.monotonic()
    loss = train(model, found, padding, device, given)
    with files.replacing(given.out) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(json.dumps({"examples": len(found), "loss": loss, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()

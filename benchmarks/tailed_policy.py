"""The policy of `flashrl prepare tiny` with long-tailed responses, for benchmarks.async.

    flashrl prepare tiny && python -m benchmarks.tailed_policy FOLDER [--share 0.1] [--long 100] [--limit 256]

Most responses think for a few tokens and then work the sum out, and a share of them for `--long` tokens in the mean:
lengths are a mixture of two geometric distributions, as chains of thought have some that are many times as long as the
median. It is learned from demonstrations, in about two minutes of two cores; the lengths that the policy then samples
are printed.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from pathlib import Path
from typing import Any

from flashrl_cli import contract, files
from flashrl_cli.data.tiny import MAX_NEW_TOKENS, Demonstrations, WarmUp, sampled, save, teach
from flashrl_cli.paths import DatasetPaths

SHORT = 3.0
"""Mean length of the other chains."""
QUICK, SLOW = ".", "~"
"""The token of each kind of chain: its first one decides for how long the policy goes on."""


class Chains(Demonstrations):
    """Demonstrations with a chain before the solution, together at most `limit` tokens."""

    def __init__(self, tokenizer: Any, seed: int, *, share: float, long: float, limit: int) -> None:
        super().__init__(tokenizer, seed)
        self.share, self.long, self.limit = share, long, limit - MAX_NEW_TOKENS
        self.width = max(map(len, self.prompts.values())) + limit

    def batch(self, size: int, *, careless: bool) -> tuple[Any, Any]:
        """As above, without the columns that are padding in all rows."""
        ids, labels = super().batch(size, careless=careless)
        used = int((ids != self.tokenizer.pad_token_id).any(0).sum())
        return ids[:, :used], labels[:, :used]

    def answer(self, a: int, b: int, *, careless: bool) -> str:
        slow = self.rng.random() < self.share
        mean = self.long if slow else SHORT
        length = 1 + int(math.log(1 - self.rng.random()) / math.log(1 - 1 / mean))
        return (SLOW if slow else QUICK) * min(length, self.limit) + super().answer(a, b, careless=careless)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.1, help="of the long chains (default %(default)s)")
    parser.add_argument("--long", type=float, default=100.0, help="their mean length (default %(default)s)")
    parser.add_argument("--limit", type=int, default=256, help="of a response, in tokens (default %(default)s)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} exists")
    for key, value in contract.THREADS.items():
        os.environ.setdefault(key, value)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(given.seed)
    known = DatasetPaths.named("tiny").model
    model = AutoModelForCausalLM.from_pretrained(known, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(known)
    chains = Chains(tokenizer, given.seed, share=given.share, long=given.long, limit=given.limit)
    recipe = WarmUp(batch=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(1, given.steps + 1):
        loss = teach(model, optimizer, chains, recipe, careless=False)
        if step % 20 == 0:
            print(f"step {step}, loss {loss:.3f}", flush=True)
    responses = sampled(model, chains, chains.pairs["test"], limit=given.limit)
    lengths = sorted((responses != tokenizer.pad_token_id).sum(-1).tolist())
    cuts = statistics.quantiles(lengths, n=100, method="inclusive")
    print(
        {"mean": statistics.fmean(lengths), "p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "longest": lengths[-1]}
    )
    with files.replacing(given.folder) as folder:
        save(model, tokenizer, folder)


if __name__ == "__main__":
    main()

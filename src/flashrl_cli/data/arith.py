"""Sums of two numbers below 100, in words: a generated data set for a policy that trains on a laptop's CPU.

The answer ends in `#### n` and the rows have GSM8K's data_source, so that verl's own GSM8K scorer grades them.
"""

from __future__ import annotations

import itertools
import random

from flashrl_cli.data.rows import Raw, Row, make_row

SIZES = {"train": 4096, "test": 256}
Pair = tuple[int, int]


def question(a: int, b: int) -> str:
    """The question for a sum, in words."""
    return f"What is {a} plus {b}?"


def solution(a: int, b: int) -> str:
    """The solution of a sum digit by digit: units, tens with the carry, the answer (47 and 25: `12 07 #### 72`)."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    return f"{units:02d} {tens:02d} #### {a + b}"


def pairs(seed: int) -> dict[str, list[Pair]]:
    """Disjoint pairs of numbers below 100 for each split, drawn with `seed` from all 10,000."""
    drawn = list(itertools.product(range(100), range(100)))
    random.Random(seed).shuffle(drawn)
    test = SIZES["test"]
    return {"train": drawn[test : test + SIZES["train"]], "test": drawn[:test]}


def row(raw: Raw, split: str, index: int) -> Row:
    """The row for one sum `{"a": …, "b": …}`."""
    a, b = raw["a"], raw["b"]
    extra = {"split": split, "index": index, "answer": solution(a, b), "question": question(a, b)}
    return make_row("openai/gsm8k", question(a, b), str(a + b), extra)

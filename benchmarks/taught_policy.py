"""The policy of `flashrl prepare tiny`, wider: layers of several FP8 blocks of 128, for a mismatch that judges them.

    PYTHONPATH=.:src python benchmarks/taught_policy.py FOLDER [--width 256]
    flashrl prepare tiny && flashrl bench --model FOLDER --rollout bf16,int8,fp8,fp8-block --mismatch --data tiny

At the usual width of 128 a layer of attention is one block, and a scale for each block is one for the whole weight. A
width of 256 has 1.4 M parameters and 4 or 8 blocks a weight; it is taught on the CPU, in about three minutes of two
cores.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from flashrl_cli import contract, files
from flashrl_cli.data.tiny import WarmUp, save, warm_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--width", type=int, default=256, help="of the hidden state, a multiple of 128 (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for key, value in contract.THREADS.items():
        os.environ.setdefault(key, value)
    # a wider model wants smaller steps
    usual = WarmUp()
    recipe = replace(usual, clean_lr=usual.clean_lr * 128 / given.width)
    model, tokenizer, taught = warm_up(seed=given.seed, width=given.width, recipe=recipe, report=print)
    with files.replacing(given.folder) as folder:
        save(model, tokenizer, folder)
    print({"width": given.width, **taught})


if __name__ == "__main__":
    main()

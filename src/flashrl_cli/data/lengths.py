"""How long prompts are: in tokens of a given tokenizer, chat template included, as verl counts them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flashrl_cli.data.extras import require
from flashrl_cli.data.hub import detect_offline
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.paths import absolute

if TYPE_CHECKING:
    from flashrl_cli.data.rows import Row

BATCH = 512


def load_tokenizer(name: str) -> Any:
    """Tokenizer of a local folder or a hub id. EnvironmentNotReady if it is neither here nor to be had."""
    local = absolute(name)
    if not local.is_dir():
        detect_offline()
    try:
        tokenizer = require("transformers").AutoTokenizer.from_pretrained(str(local) if local.is_dir() else name)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise EnvironmentNotReady(
            f"cannot load the tokenizer {name}: {first}", hint="--tokenizer PATH takes a local folder"
        ) from error
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer {name} has no chat template", hint="give that of an instruction-tuned model")
    return tokenizer


def prompt_tokens(tokenizer: Any, rows: Sequence[Row], advance: Callable[[int], None]) -> list[int]:
    """Number of tokens of each row's prompt with the generation prompt (verl/utils/dataset/rl_dataset.py:250)."""
    lengths: list[int] = []
    for start in range(0, len(rows), BATCH):
        chats = [row["prompt"] for row in rows[start : start + BATCH]]
        tokens = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=False)
        lengths += map(len, tokens)
        advance(len(chats))
    return lengths


def summary(lengths: Sequence[int]) -> dict[str, int]:
    """Median, 99th percentile (nearest rank) and maximum."""
    ordered = sorted(lengths)
    ranks = {"p50": 0.5, "p99": 0.99, "longest": 1.0}
    return {name: ordered[math.ceil(part * len(ordered)) - 1] for name, part in ranks.items()}

"""What was prepared, as the rows of a small table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TOKENS = {"p50": "tokens p50", "p99": "tokens p99", "longest": "longest"}


def summary_table(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """Columns and rows, one row a split; lengths are those of prompts, in tokens where these were counted."""
    splits = [(result["dataset"], split, entry) for result in results for split, entry in result["splits"].items()]
    counted = any("prompt_tokens" in entry for _, _, entry in splits)
    lengths = list(TOKENS.values()) if counted else ["longest (characters)"]
    rows = [
        [name, split, entry["rows"], entry.get("duplicates"), *_lengths(entry, counted)]
        for name, split, entry in splits
    ]
    return ["data set", "split", "rows", "duplicates dropped", *lengths], rows


def _lengths(entry: dict[str, Any], counted: bool) -> list[object]:
    if counted:
        return [entry.get("prompt_tokens", {}).get(key) for key in TOKENS]
    return [entry.get("longest_characters")]

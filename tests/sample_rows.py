"""Rows in verl's schema that training and evaluation take, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def row(number: int = 1, **columns: Any) -> dict[str, Any]:
    """A sum, with `columns` in place of its own."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"What is {number} plus {number}?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * number)},
        "extra_info": {"split": "train", "index": number},
        **columns,
    }


def truth(value: Any, source: str = "openai/gsm8k") -> dict[str, Any]:
    """Columns of a row with another truth, or none at all for `...`."""
    reward = {"style": "rule"} | ({} if value is ... else {"ground_truth": value})
    return {"data_source": source, "reward_model": reward}


def write(path: Path, rows: Iterable[Mapping[str, Any]] | None = None) -> Path:
    """Write rows (four sums, if none are given) as Parquet, JSON lines or a JSON array, by the file's name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = [row(number) for number in range(1, 5)] if rows is None else list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(f"{json.dumps(one)}\n" for one in found), encoding="utf-8")
    return path

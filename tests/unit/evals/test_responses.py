"""Responses in a Parquet file, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.evals import results
from tests.graded import entry, single


def test_rows_can_be_chosen_and_columns_too(tmp_path: Path) -> None:
    file = tmp_path / results.FILE
    results.write(file, [entry("a", 1, single(2, 2)), entry("a", 1, single(1, 1), "math"), entry("b", None, [[True]])])
    assert results.read_responses(file, ("question", "correct"), run="a", dataset="gsm8k", question=[1, 3]) == [
        {"question": 1, "correct": True},
        {"question": 3, "correct": False},
    ]
    assert [row["step"] for row in results.read_responses(file, run="b")] == [None]
    assert len(results.read_responses(file)) == 7


@pytest.mark.parametrize("content", [b"", b"step,score\n"])
def test_what_is_no_parquet_file_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.parquet cannot be read"):
        results.read_responses(file)


def test_another_parquet_file_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "test.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "run": ["b"]}), file)
    with pytest.raises(InputError, match=r"test\.parquet"):
        results.read_responses(file)
    with pytest.raises(InputError, match=r"test\.parquet"):
        results.read_responses(file, run="b", question=[1])


def test_prompts_as_text() -> None:
    assert results.text_of([{"role": "user", "content": "1 + 1?"}]) == "1 + 1?"
    parts = [{"type": "image"}, {"type": "text", "text": "é"}]
    assert results.text_of([{"role": "system", "content": "Think."}, {"role": "user", "content": parts}]) == (
        '[system]\nThink.\n\n[user]\n[{"type": "image"}, {"type": "text", "text": "é"}]'
    )

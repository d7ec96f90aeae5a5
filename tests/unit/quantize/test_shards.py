"""safetensors files written in any order are what a reader expects: its own table, no gaps, aligned."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.quantize.tensors import BYTES, Entry, ShardFile, layout
from flashrl_cli.weights import table

ENTRIES = st.lists(
    st.builds(
        Entry,
        name=st.text("ab.é", min_size=1, max_size=8),
        dtype=st.sampled_from(sorted(BYTES)),
        shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    unique_by=lambda entry: entry.name,
    max_size=8,
)


@given(entries=ENTRIES)
def test_a_file_is_whole_and_each_tensor_is_in_its_place(
    entries: list[Entry], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("shard") / "model.safetensors"
    with ShardFile(file, entries) as out:
        for number, entry in reversed(list(enumerate(entries))):
            for offset in range(0, entry.bytes, 3):
                out.write(entry.name, offset, memoryview(bytes([number] * min(3, entry.bytes - offset))))
    found, start = table(file)
    data = file.read_bytes()
    assert start % 8 == 0
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in found.items()} == {
        entry.name: (entry.dtype, entry.shape) for entry in entries
    }
    for number, entry in enumerate(entries):
        first, last = found[entry.name]["data_offsets"]
        assert first % BYTES[entry.dtype] == 0
        assert data[start + first : start + last] == bytes([number] * entry.bytes)


def test_a_layout_says_how_large_the_file_becomes() -> None:
    found = layout([Entry(name="a", dtype="I8", shape=(3, 5)), Entry(name="s", dtype="F32", shape=(3, 1))])
    assert found.size == len(found.head) + 27
    assert found.starts == {"s": len(found.head), "a": len(found.head) + 12}


def test_no_file_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError):
        ShardFile(tmp_path / "model.safetensors", [])

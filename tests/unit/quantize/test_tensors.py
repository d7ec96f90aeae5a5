"""A model's tensors without torch: described by their files' tables, read in blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.quantize import tensors
from flashrl_cli.quantize.tensors import BYTES, Desk, Entry, ShardFile, Tensor, described, layout
from flashrl_cli.weights import Unreadable, Weights, table
from tests.unit.quantize.models import QWEN2, hf_model, saved


def test_described(tmp_path: Path) -> None:
    found = described(Weights(hf=hf_model(tmp_path / "m")))
    assert {name: tensor.shape for name, tensor in found.items()} == QWEN2
    assert {tensor.dtype for tensor in found.values()} == {"BF16"}
    assert found["model.norm.weight"].bytes == 64


def test_a_tied_head_is_left_out(tmp_path: Path) -> None:
    assert "lm_head.weight" not in described(Weights(hf=hf_model(tmp_path / "m", tie_word_embeddings=True)))


def test_a_file_of_every_shard(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m")
    saved(folder / "two.safetensors", {"x.weight": (2, 2)})
    weight_map = dict.fromkeys(QWEN2, "model.safetensors") | {"x.weight": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert described(Weights(hf=folder))["x.weight"].file == folder / "two.safetensors"


def test_unknown_dtypes_and_lengths(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m", {"a.weight": (2, 2)})
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"BF16"', b'"F4X2"'))
    with pytest.raises(Unreadable, match=r"model\.safetensors: a\.weight has the dtype F4X2"):
        described(Weights(hf=folder))
    file.write_bytes(whole.replace(b"[2,2]", b"[2,3]"))
    with pytest.raises(Unreadable, match=r"a\.weight is not as long as its shape says"):
        described(Weights(hf=folder))


def test_blocks_hold_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK", 24)
    tensor = Tensor(name="a", shape=(7, 5), dtype="BF16")
    assert list(tensor.spans(5)) == [range(10), range(10, 20), range(20, 30), range(30, 35)]
    assert [len(span) for span in tensor.spans()] == [12, 12, 11]
    assert [len(span) for span in Tensor(name="a", shape=(2, 50), dtype="F32").spans(50)] == [50, 50]
    assert not list(Tensor(name="a", shape=(0, 5), dtype="F32").spans(5))


def test_a_block_is_read_where_it_lies(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m", {"model.a": (1,)})
    (folder / "model.safetensors").unlink()
    with ShardFile(folder / "model.safetensors", [Entry(name="a", dtype="U8", shape=(100,))]) as out:
        out.write("a", 0, memoryview(bytes(range(100))))
    tensor = described(Weights(hf=folder))["a"]
    desk = Desk()
    assert bytes(desk.converted(tensor, range(10, 14), "U8")) == bytes(range(10, 14))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(Unreadable, match=r"model\.safetensors is torn: it became shorter"):
        desk.converted(tensor, range(10, 14), "U8")
    (folder / "model.safetensors").unlink()
    with pytest.raises(Unreadable, match=r"model\.safetensors cannot be read: No such file"):
        desk.converted(tensor, range(10, 14), "U8")


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

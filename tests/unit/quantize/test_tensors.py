"""A model's tensors without torch: described by their files' tables, read in blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli.quantize import tensors
from flashrl_cli.quantize.tensors import Desk, Entry, ShardFile, Tensor, described
from flashrl_cli.weights import Unreadable, Weights
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

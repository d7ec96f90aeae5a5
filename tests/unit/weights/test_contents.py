"""Whether a file is whole, by its list of contents alone; whatever cuts or damages it."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_cli.weights import beside, companions
from flashrl_cli.weights.contents import Unreadable, checksums, model_files, read_json, table, torn
from tests.saved_files import saved_file, saved_tensors


@settings(deadline=None)
@given(data=st.data())
def test_no_cut_is_overlooked(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = saved_file(tmp_path_factory.mktemp("cut") / "model.pt")
    whole = file.read_bytes()
    assert torn(file) is None
    file.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    assert torn(file) == "truncated or damaged"


@settings(deadline=None)
@given(data=st.data())
def test_zeros_at_the_end_and_noise_are_no_archive(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The last two bytes are zeros in every archive: the length of a comment."""
    file = saved_file(tmp_path_factory.mktemp("zeros") / "model.pt")
    whole = file.read_bytes()
    zeros = data.draw(st.integers(3, len(whole)))
    file.write_bytes(whole[:-zeros] + bytes(zeros))
    assert (torn(file) is None) == (file.read_bytes() == whole)
    file.write_bytes(data.draw(st.binary(min_size=1, max_size=200)))
    assert torn(file) == "truncated or damaged"


@settings(deadline=None)
@given(data=st.data())
def test_damage_never_raises(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = saved_file(tmp_path_factory.mktemp("noise") / "model.pt")
    whole = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # the list of contents and its end, which decide what is read
        whole[data.draw(st.integers(len(whole) - 400, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(whole)
    assert torn(file) in {None, "truncated or damaged"}


def test_a_zip_that_torch_did_not_write(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "x")
    assert torn(file) == "truncated or damaged"


def test_checksums_do_not_depend_on_the_name_of_the_file(tmp_path: Path) -> None:
    assert checksums(saved_file(tmp_path / "one.pt")) == checksums(saved_file(tmp_path / "two.pt"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert torn(tmp_path / "model.pt") == "missing"
    (tmp_path / "model.pt").touch()
    assert torn(tmp_path / "model.pt") == "empty"
    assert torn(tmp_path) == "unreadable (Is a directory)"


def test_a_table_of_tensors(tmp_path: Path) -> None:
    entries, start = table(saved_tensors(tmp_path / "model.safetensors", a=b"1234", b=b"12"))
    assert {name: entry["data_offsets"] for name, entry in entries.items()} == {"a": [0, 4], "b": [4, 6]}
    assert (tmp_path / "model.safetensors").stat().st_size == start + 6
    assert table(saved_tensors(tmp_path / "none.safetensors"))[0] == {}


@settings(deadline=None)
@given(data=st.data())
def test_no_cut_of_a_safetensors_file_is_overlooked(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = saved_tensors(tmp_path_factory.mktemp("cut") / "model.safetensors", a=bytes(40), b=bytes(30))
    file.write_bytes(file.read_bytes()[: data.draw(st.integers(0, file.stat().st_size - 1))])
    with pytest.raises(Unreadable, match=r"model\.safetensors is torn"):
        table(file)


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "1", '{"a": 1}', '{"a": {}}', '{"a": {"data_offsets": []}}', '{"a": {"data_offsets": ["", ""]}}'],
)
def test_a_table_that_is_none(text: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    with pytest.raises(Unreadable, match="is torn: truncated or damaged"):
        table(file)


def test_a_table_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="cannot be read: No such file"):
        table(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(Unreadable, match="is torn: empty"):
        table(tmp_path / "model.safetensors")


def test_the_files_of_a_model(tmp_path: Path) -> None:
    assert model_files(tmp_path) == [tmp_path / "model.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "1.safetensors"}}))
    assert model_files(tmp_path) == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for text in ("{}", '{"weight_map": []}', "[]", "{"):
        index.write_text(text)
        with pytest.raises(Unreadable, match=r"index\.json is damaged"):
            model_files(tmp_path)


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="cannot be read"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(Unreadable, match="is damaged"):
        read_json(tmp_path / "config.json")


TAKEN = (
    "LICENSE", "README.md", "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json",
    "merges.txt", "modeling_own.py", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
)  # fmt: skip
LEFT = (
    "consolidated.00.pth", "consolidated.safetensors", "flax_model.msgpack", "model.gguf", "model.onnx", "optimizer.pt",
    "params.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "rng_state.pth", "scheduler.pt", "tf_model.h5",
    "trainer_state.json",
    "training_args.bin",
)  # fmt: skip
FOLDERS = ("checkpoint-500", "global_step_10", "onnx", "original", "runs")


def model(folder: Path, *more: str) -> Path:
    folder.mkdir(exist_ok=True)
    saved_tensors(folder / "model.safetensors", a=b"1")
    for name in (*TAKEN, *more):
        (folder / name).write_text("{}")
    return folder


def names(paths: tuple[Path, ...]) -> list[str]:
    return [str(path) for path in paths]


def test_weights_in_other_forms_and_what_a_trainer_keeps_stay(tmp_path: Path) -> None:
    """Hidden files too, of which nothing is said; chat templates with names are the tokenizer's."""
    hf = model(tmp_path / "m", *LEFT, ".gitattributes")
    for name in FOLDERS:
        model(hf / name)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    found = companions(hf)
    assert names(found.taken) == sorted([*TAKEN, "additional_chat_templates/tools.jinja"])
    assert list(found.left) == sorted([*LEFT, *(f"{name}/" for name in FOLDERS)])


def test_a_file_that_the_index_does_not_name_is_another_model(tmp_path: Path) -> None:
    """The index says which files are the model; beside it a single file may be left of an earlier save."""
    hf = model(tmp_path / "m")
    saved_tensors(hf / "model-00001.safetensors", a=b"1")
    assert companions(hf).left == ("model-00001.safetensors",)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    assert companions(hf).left == ("model.safetensors",)


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    """Left out and named, unless it is a part of the model; so are a link to itself and one to a blob of the hub's
    cache that is gone.
    """
    hf = model(tmp_path / "m")
    for name, target in (("README.md", "/nonexistent/blob"), ("LICENSE", "LICENSE"), ("notes.txt", "../../blobs/0a1b")):
        (hf / name).unlink(missing_ok=True)
        (hf / name).symlink_to(target)
    assert companions(hf).left == ("LICENSE", "README.md", "notes.txt")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"):
        (hf / name).unlink()
        (hf / name).symlink_to("../../blobs/gone")
        with pytest.raises(Unreadable, match=f"holds links to files that do not exist: {name}; download or copy"):
            companions(hf)
        assert name not in {file.name for file in beside(hf)}
        (hf / name).unlink()


def test_a_snapshot_in_the_hubs_cache(tmp_path: Path) -> None:
    """Its files are links to blobs."""
    hf = model(tmp_path / "m")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, name in enumerate(TAKEN):
        (hf / name).rename(blobs / str(number))
        (hf / name).symlink_to(f"../blobs/{number}")
    assert names(companions(hf).taken) == sorted(TAKEN)
    assert companions(hf).left == ()


def test_names_that_the_caller_leaves_out(tmp_path: Path) -> None:
    hf = model(tmp_path / "m", "own.json", "lora_train_meta.json", "adapter_config.json")
    found = companions(hf, without=["own.json"])
    assert "own.json" not in {*names(found.taken), *found.left}
    assert found.left == ("adapter_config.json", "lora_train_meta.json")

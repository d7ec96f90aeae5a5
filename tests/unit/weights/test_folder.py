"""What goes with a model when its weights are written elsewhere, and what is left behind and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli.weights import beside, companions
from flashrl_cli.weights.contents import Unreadable
from tests.saved_files import saved_tensors

TAKEN = (
    "LICENSE", "README.md", "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
    "modeling_own.py", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
)  # fmt: skip
LEFT = (
    "consolidated.00.pth", "consolidated.safetensors", "flax_model.msgpack", "model.gguf", "model.onnx", "optimizer.pt", "params.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "rng_state.pth", "scheduler.pt", "tf_model.h5", "trainer_state.json",
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
    """Left out and named, unless it is a part of the model; so are a link to itself and one to a blob of the hub's cache that is gone."""
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

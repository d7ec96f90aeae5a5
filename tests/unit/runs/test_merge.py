"""Merged checkpoints appear whole, each in its place, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashrl_cli.errors import EnvironmentNotReady, InputError, RunFailed
from flashrl_cli.runs import merge
from flashrl_cli.runs.checkpoints import Checkpoint
from flashrl_cli.runs.merge import merged, new_folder
from flashrl_cli.weights import Weights, accounting
from tests.saved_files import saved_model, saved_tensors


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = accounting.Expected(
        forms=({"a": (2,), "tied": (2,)},), optional=frozenset({"tied"}), ignored=(), integers=frozenset()
    )
    monkeypatch.setattr(accounting, "_of_config", lambda text: expected)


def checkpoint(folder: Path, run: str, step: int | None, data: bytes = b"1234") -> Checkpoint:
    hf = folder / run / str(step)
    saved_tensors(hf / "model.safetensors", "BF16", a=data)
    (hf / "config.json").write_text('{"dtype": "float32", "model_type": "qwen2"}')
    (hf / "tokenizer.json").write_text("{}")
    return Checkpoint(source=hf.parent, step=step, hf=hf, run=run)


def count(_: int) -> None:
    """Progress that nobody looks at."""


def test_one_checkpoint_is_the_folder(tmp_path: Path) -> None:
    done: list[int] = []
    one = checkpoint(tmp_path, "a", 3)
    (folder,) = merged([one], tmp_path / "out" / "model", done.append)
    assert (folder, done) == (tmp_path / "out" / "model", [1])
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "qwen2", "dtype": "bfloat16"}
    assert (folder / "model.safetensors").read_bytes() == (one.hf / "model.safetensors").read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_several_lie_by_run_and_step(tmp_path: Path) -> None:
    done: list[int] = []
    several = [checkpoint(tmp_path, "a", 1), checkpoint(tmp_path, "p/b", 20), checkpoint(tmp_path, "base", None)]
    folders = merged(several, tmp_path / "out", done.append)
    names = ["a/global_step_1", "p/b/global_step_20", "base"]
    assert folders == [tmp_path / "out" / name for name in names]
    assert all((folder / "model.safetensors").is_file() for folder in folders)
    assert sum(done) == 3
    with pytest.raises(InputError, match="two of the checkpoints have the same name"):
        merged([several[0], several[0]], tmp_path / "again", count)


def test_a_quantized_models_config_stays(tmp_path: Path) -> None:
    one = checkpoint(tmp_path, "a", None)
    (one.hf / "config.json").write_text('{"dtype": "float16", "quantization_config": {}}')
    (folder,) = merged([one], tmp_path / "out", count)
    assert (folder / "config.json").read_text() == (one.hf / "config.json").read_text()


def test_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert new_folder(tmp_path / "empty") == tmp_path / "empty"
    assert new_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in (".", "file", "link"):
        with pytest.raises(InputError, match="exists already"):
            new_folder(tmp_path / name)
    one, two = checkpoint(tmp_path, "a", 1), checkpoint(tmp_path, "a", 2)
    (tmp_path / "out" / "a" / "global_step_2" / "x").mkdir(parents=True)
    with pytest.raises(InputError, match="global_step_2 exists already"):
        merged([one, two], tmp_path / "out", count)
    assert not (tmp_path / "out" / "a" / "global_step_1").exists()


def test_what_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    torn, foreign = checkpoint(tmp_path, "a", 1), checkpoint(tmp_path, "a", 2, b"123456")
    file = torn.hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunFailed, match=r"a/1 cannot be merged: .*model\.safetensors is torn"):
        merged([torn], tmp_path / "out" / "model", count)
    with pytest.raises(RunFailed, match=r"cannot be merged: .*other shapes than config\.json asks for: a"):
        merged([foreign], tmp_path / "out" / "model", count)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_place_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = checkpoint(tmp_path, "a", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(EnvironmentNotReady, match=r"no room for 0\.0 GiB of weights"):
        merged([one], tmp_path / "out", count)
    size = (one.hf / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    assert merged([one], tmp_path / "out", count)


def test_room_for_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in float32 take half as much in bf16."""
    actor = saved_model(tmp_path / "actor")
    shards = tuple(sorted(actor.glob("model_*.pt")))
    one = Checkpoint(source=tmp_path, step=1, hf=actor / "huggingface", shards=shards, run="a")
    size = sum(shard.stat().st_size for shard in shards)

    def write(weights: Weights, folder: Path) -> merge.Written:
        folder.mkdir()
        return merge.Written(shapes={}, compared="", left=())

    monkeypatch.setattr(merge, "write", write)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(EnvironmentNotReady, match="no room"):
        merged([one], tmp_path / "out", count)
    monkeypatch.setattr(merge, "stored_in_float32", lambda shard: shard == shards[0])
    assert merged([one], tmp_path / "out", count)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentNotReady, match="cannot be written"):
        merged([checkpoint(tmp_path, "a", 1)], tmp_path / "file" / "out", count)

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli.memory.model import shape_of
from tests.unit.memory.test_shape import LLAMA


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def write(folder: Path, config: object) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_and_a_prepared_model(tmp_path: Path) -> None:
    write(tmp_path / "tiny" / "model", LLAMA)
    for reference in (str(tmp_path / "tiny" / "model"), "prepared:tiny"):
        shape = shape_of(reference, tmp_path)
        assert shape is not None
        assert shape.hidden == 2048


def test_the_hub_cache_comes_before_the_table(no_cache: Path) -> None:
    folder = no_cache / "models--Qwen--Qwen2.5-7B"
    write(folder / "snapshots" / "abc", LLAMA)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc\n")
    cached, table = (shape_of(name, Path("/nowhere")) for name in ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"))
    assert cached is not None
    assert table is not None
    assert (cached.hidden, table.hidden) == (2048, 3584)


def test_other_places_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "elsewhere" / "models--me--mine"
    write(folder / "snapshots" / "abc", LLAMA)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert shape_of("me/mine", tmp_path) is None
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert shape_of("me/mine", tmp_path) is not None


def test_base_and_instruct_differ_in_context_only() -> None:
    base, chat, math = (shape_of(f"Qwen/Qwen2.5-{name}", Path()) for name in ("7B", "7B-Instruct", "Math-7B"))
    assert base is not None
    assert chat is not None
    assert math is not None
    assert (base.max_positions, chat.max_positions, math.max_positions) == (131072, 32768, 4096)
    assert base.intermediate == chat.intermediate == math.intermediate


def test_nothing_known(tmp_path: Path) -> None:
    assert shape_of("some/model", tmp_path) is None
    assert shape_of("prepared:tiny", tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert shape_of(str(tmp_path), tmp_path) is None
    (tmp_path / "config.json").write_text("[]")
    assert shape_of(str(tmp_path), tmp_path) is None


def test_a_config_that_is_no_decoder_s_says_so(tmp_path: Path) -> None:
    write(tmp_path / "vision", {"model_type": "gemma3", "text_config": {"hidden_size": 1}})
    with pytest.raises(ValueError, match="gemma3 model with text_config"):
        shape_of(str(tmp_path / "vision"), tmp_path)

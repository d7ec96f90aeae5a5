"""HF models by folder and by id: what is missing is named; the hub's cache is asked first, the network last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import hub
from flashrl_cli.errors import InputError
from flashrl_cli.hub import config_problem, hf_problem, is_hub_id, model_folder, quantization, tokenizer_problem
from tests.saved_files import cached_model, saved_tensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOME = Path("/people/somebody")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, on a machine without a network, in an empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", *hub.OFFLINE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "resolves", lambda _: False)
    return tmp_path / "hf" / "hub"


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    saved_tensors(folder / "model.safetensors", a=b"1")
    return folder


def test_hf_problem(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    assert hf_problem(folder) is None
    (folder / "model.safetensors").write_bytes(b"")
    assert hf_problem(folder) == "no weights (model.safetensors)"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    assert hf_problem(folder) == "missing or empty: model-1.safetensors"
    (folder / "model-1.safetensors").write_bytes(b"x")
    assert hf_problem(folder) is None
    index.write_text("[]")
    assert hf_problem(folder) == "model.safetensors.index.json is damaged"
    for damaged in ("{", "[]"):
        (folder / "config.json").write_text(damaged)
        assert hf_problem(folder) == config_problem(folder) == "config.json is damaged"
    assert hf_problem(tmp_path) == "no config.json"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"])
def test_tokenizers(name: str, tmp_path: Path) -> None:
    assert tokenizer_problem(tmp_path) == "no tokenizer"
    (tmp_path / name).touch()
    assert tokenizer_problem(tmp_path) is None


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}},
            "compressed-tensors",
        ),
        ({"quantization_config": {}}, "an unnamed method"),
    ],
)
def test_quantization(config: dict[str, Any], method: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantization(tmp_path) == method


@pytest.mark.parametrize("name", ["Qwen", "/Qwen/a", "./a", "a/b/c", "a/*", "~/a", "a/b ", "a//b", ""])
def test_what_is_no_id_on_the_hub(name: str) -> None:
    assert not is_hub_id(name)
    with pytest.raises(InputError, match=r"no HF model: no config\.json"):
        model_folder(name)


def test_a_folder_goes_before_the_hub(cache: Path) -> None:
    cached_model(cache, "Qwen/Qwen2.5-0.5B")
    folder = model(Path("Qwen/Qwen2.5-0.5B"))
    assert model_folder("Qwen/Qwen2.5-0.5B") == folder.absolute()


def test_a_model_in_the_hubs_cache(cache: Path) -> None:
    folder = cached_model(cache, "Qwen/Qwen2.5-0.5B")
    assert model_folder("Qwen/Qwen2.5-0.5B") == folder


@pytest.mark.parametrize("switch", [None, *hub.OFFLINE])
def test_a_model_that_is_not_to_be_had(switch: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if switch:
        monkeypatch.setenv(switch, "1")
        monkeypatch.setattr(
            hub, "resolves", lambda _: pytest.fail("a machine that is to stay offline asked for a name")
        )
    with pytest.raises(
        InputError, match=r"a/b is no folder here .* \(it is not there\), and this machine is off"
    ) as caught:
        model_folder("a/b")
    assert caught.value.hint
    assert "hf download a/b" in caught.value.hint
    (cached_model(cache, "a/b") / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"in the hub's cache \(no weights"):
        model_folder("a/b")


def test_a_model_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, *, allow_patterns: list[str], local_files_only: bool = False, **where: Any) -> str:
        assert where == {"cache_dir": cache}
        if local_files_only:
            return str(kept(name, allow_patterns=allow_patterns, local_files_only=True, **where))
        assert "*.safetensors" in allow_patterns
        return str(cached_model(cache, name))

    kept = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "resolves", lambda environment: environment is os.environ)
    assert model_folder("a/b") == cache / "models--a--b" / "snapshots" / COMMIT


def test_a_model_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    import huggingface_hub

    def refuse(*_: object, local_files_only: bool = False, **__: object) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("none")
        answer = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
        raise huggingface_hub.errors.HfHubHTTPError("404 Client Error\n\nmore", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(hub, "resolves", lambda _: True)
    with pytest.raises(InputError, match=r"a/b is no folder here, and cannot be fetched: 404 Client Error$"):
        model_folder("a/b")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, "/people/somebody/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
    ],
)
def test_place_of_the_cache(environment: dict[str, str], place: str) -> None:
    assert hub.hub_cache(environment, HOME) == Path(place)


@pytest.mark.parametrize(
    ("environment", "switch"),
    [
        ({}, None),
        ({"HF_HUB_OFFLINE": "0"}, None),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"TRANSFORMERS_OFFLINE": "True"}, "TRANSFORMERS_OFFLINE"),
    ],
)
def test_offline(environment: dict[str, str], switch: str | None) -> None:
    assert hub.offline(environment) == switch


def test_cached_models(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen2.5-32B/snapshots/abc"
    snapshot.mkdir(parents=True)
    assert not hub.is_cached("Qwen/Qwen2.5-32B", tmp_path)
    (snapshot / "config.json").write_text("{}")
    assert hub.is_cached("Qwen/Qwen2.5-32B", tmp_path)
    assert not hub.is_cached("Qwen/Qwen2.5-7B", tmp_path)

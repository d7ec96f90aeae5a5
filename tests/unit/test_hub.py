"""The hub's cache and its offline switch."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli import hub

HOME = Path("/people/somebody")


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({}, "/people/somebody/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
    ],
)
def test_hub_cache(environment: dict[str, str], cache: str) -> None:
    assert hub.hub_cache(environment, HOME) == Path(cache)


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

"""The hub's folders and switches, and proxies."""

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


def test_token(tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path)}
    assert not hub.probe_token(environment, HOME)
    assert hub.probe_token({"HF_TOKEN": "x"}, HOME)
    (tmp_path / "token").write_text("x")
    assert hub.probe_token(environment, HOME)


def test_hub() -> None:
    on = hub.hub(Path("/c"), None, token=True, endpoint="https://mirror")
    assert on.text == "switched on at https://mirror, with a token; cache /c"
    off = hub.hub(Path("/c"), "HF_HUB_OFFLINE", token=False, endpoint=None)
    assert off.text == "switched off by HF_HUB_OFFLINE; cache /c"


@pytest.mark.parametrize(
    ("environment", "levels"),
    [
        ({}, []),
        ({"no_proxy": "x"}, []),
        ({"https_proxy": ""}, []),
        ({"https_proxy": "http://p"}, ["warn"]),
        ({"HTTP_PROXY": "http://p", "NO_PROXY": "localhost"}, ["warn"]),
        ({"HTTP_PROXY": "http://p", "NO_PROXY": "localhost, 127.0.0.1,.corp"}, ["ok"]),
        ({"all_proxy": "http://p", "no_proxy": "*"}, ["ok"]),
    ],
)
def test_proxies(environment: dict[str, str], levels: list[str]) -> None:
    assert [finding.level for finding in hub.proxies(environment)] == levels

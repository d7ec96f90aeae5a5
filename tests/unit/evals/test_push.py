"""Uploading to the hub, by a client that keeps what it is told: refusals come first, and no token is shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data import sources
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.evals.export import STALE, Repository, repository

TOKEN = "hf_" + "x" * 20


class Api:
    """As much of `huggingface_hub.HfApi` as is used."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **how: Any) -> str:
        self.calls.append((name, how))
        return f"hub/{name}"

    def upload_folder(self, **how: Any) -> None:
        if self.failure:
            raise self.failure
        self.calls.append(("upload", how))


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in sources.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "detect_offline", lambda: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)


def test_upload(tmp_path: Path) -> None:
    api = Api()
    assert Repository("me/m", api).upload(tmp_path, private=True, message="r, step 3") == "hub/me/m"
    assert api.calls == [
        ("me/m", {"private": True, "exist_ok": True}),
        (
            "upload",
            {"repo_id": "me/m", "folder_path": tmp_path, "commit_message": "r, step 3", "delete_patterns": STALE},
        ),
    ]


def test_a_refusal_keeps_the_token_to_itself(tmp_path: Path) -> None:
    api = Api(OSError(f"403 Forbidden for {TOKEN}"))
    with pytest.raises(EnvironmentNotReady, match="me/m was not uploaded: 403 Forbidden for …") as caught:
        Repository("me/m", api).upload(tmp_path, private=True, message="x")
    assert TOKEN not in f"{caught.value.message}{caught.value.hint}{caught.value.__cause__}"
    assert f"hf upload me/m {tmp_path}" in str(caught.value.hint)


def test_a_repository_that_can_be_written() -> None:
    found = repository("me/m")
    assert (found.name, type(found.api).__name__) == ("me/m", "HfApi")


@pytest.mark.parametrize("name", ["", "a/b/c", "me/../m", "me/m m", "-m"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(InputError, match="not the name of a repository"):
        repository(name)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "detect_offline", lambda: os.environ.update(HF_HUB_OFFLINE="1"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    with pytest.raises(EnvironmentNotReady, match="cannot be reached"):
        repository("me/m")


def test_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(EnvironmentNotReady, match="no token") as caught:
        repository("me/m")
    assert "HF_TOKEN" in str(caught.value.hint)

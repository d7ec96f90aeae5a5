"""The hub: `datasets` itself on a folder in place of a hub id, and a machine without a network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data import sources
from flashrl_cli.data.rows import BadRows, Place
from flashrl_cli.data.sources import HubSource
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.machine import software

READ = """
import json, sys
from flashrl_cli.data.sources import HubSource
from flashrl_cli.data.rows import BadRows
source = HubSource(sys.argv[1], None, ("train", "test"))
rows = list(source.rows("test", BadRows()))
print(json.dumps([rows, source.count("train"), source.describe()["files"]]))
"""


@pytest.mark.processes
def test_rows_come_through_load_dataset(gsm8k_folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(gsm8k_folder)], env=environment, capture_output=True, text=True, check=True
    )
    rows, count, files = json.loads(done.stdout.splitlines()[-1])
    first = {"question": "test 1?", "answer": "Count.\n#### 1,000"}
    assert rows[0] == [[f"{gsm8k_folder}:test", 1, "row"], first]
    assert (len(rows), count) == (2, 3)
    assert [len(files[split]) for split in ("train", "test")] == [1, 1]
    assert files["test"][0]["path"].endswith("-test.arrow")


class Table:
    """As much of a `datasets.Dataset` as is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.cache_files = [{"filename": __file__}]

    def __len__(self) -> int:
        return len(self.rows)

    def with_format(self, name: str) -> Table:
        assert name == "arrow"
        return self

    def iter(self, size: int) -> Iterator[Table]:
        yield self

    def to_pylist(self) -> list[dict[str, Any]]:
        return self.rows


def answer_with(result: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Put a module in the place of `datasets` whose load_dataset returns or raises `result`; returns its calls."""
    calls: list[tuple[str, str | None]] = []

    def load_dataset(name: str, config: str | None) -> Any:
        calls.append((name, config))
        if isinstance(result, Exception):
            raise result
        return result

    exceptions = types.SimpleNamespace(DatasetsError=RuntimeError)
    fake = types.SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    return calls


def test_a_set_of_one_split_takes_the_only_one_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer_with({"train": Table([{"n": 1}])}, monkeypatch)
    source = HubSource("a/b", "c", ("test",))
    assert list(source.rows("test", BadRows())) == [(Place("a/b:test", 1, "row"), {"n": 1})]
    assert source.count("test") == 1
    description = source.describe()
    assert description["files"]["test"][0]["path"] == __file__
    assert calls == [("a/b", "c")]
    assert HubSource("a/b", "c", ("test",)).matches(description)
    assert not HubSource("a/b", None, ("test",)).matches(description)


def test_a_split_that_is_not_there_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with({"train": Table([])}, monkeypatch)
    with pytest.raises(InputError, match="a/b has no split 'test'"):
        HubSource("a/b", None, ("train", "test")).count("test")


def test_a_configuration_that_is_not_there_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(ValueError("Config name is missing."), monkeypatch)
    with pytest.raises(InputError, match="Config name is missing"):
        HubSource("a/b", None, ("train",)).describe()


@pytest.mark.parametrize("error", [ConnectionError("timed out"), RuntimeError("timed out")])
def test_a_hub_that_does_not_answer_is_the_environment(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(error, monkeypatch)
    with pytest.raises(EnvironmentNotReady, match="cannot fetch a/b from the hub: timed out") as caught:
        HubSource("a/b", None, ("train",)).describe()
    assert caught.value.hint
    assert "--source PATH" in caught.value.hint


def test_without_a_network_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    answer_with(ConnectionError("no"), monkeypatch)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(EnvironmentNotReady, match="this machine is offline, and the hub's cache does not hold it"):
        HubSource("a/b", None, ("train",)).describe()
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"


def test_a_proxy_resolves_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked for a name"))
    sources.detect_offline()
    assert not sources.is_offline()


def test_datasets_not_installed_is_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(None, monkeypatch)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentNotReady, match="datasets is not installed") as caught:
        HubSource("a/b", None, ("train",)).describe()
    assert caught.value.hint == software.install_extra("data")

"""Handshakes: written whole, read back as they were."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashrl_cli import contract, files
from flashrl_cli.contract import Handshake, read_handshakes, write_handshake

SHAKE = Handshake(
    host="node-1",
    pid=7,
    precision="int8",
    quantized_layers=14,
    linear_layers=15,
    quantized_bytes=123,
    kernel="K",
    vllm="0.24",
    torch="2",
    device="cpu",
    refits=1,
    refit_s=0.5,
)


def test_round_trip(tmp_path: Path) -> None:
    other = dataclasses.replace(SHAKE, pid=8, precision="bf16")
    write_handshake(tmp_path / "new", SHAKE)
    write_handshake(tmp_path / "new", other)
    assert list(read_handshakes(tmp_path / "new")) == [SHAKE, other]
    assert [path.name for path in sorted((tmp_path / "new").iterdir())] == ["node-1-7.json", "node-1-8.json"]


def test_later_refit_renews_the_file(tmp_path: Path) -> None:
    write_handshake(tmp_path, SHAKE)
    later = dataclasses.replace(SHAKE, refits=2)
    write_handshake(tmp_path, later)
    assert list(read_handshakes(tmp_path)) == [later]


def test_other_schema_is_passed_over(tmp_path: Path) -> None:
    write_handshake(tmp_path, SHAKE)
    (tmp_path / "a.json").write_text(json.dumps({"schema_version": 2, "other": "fields"}))
    (tmp_path / "notes.txt").write_text("x")
    assert list(read_handshakes(tmp_path)) == [SHAKE]


def test_half_written_file_is_not_seen(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "node-1-7.json") as temporary:
        temporary.write_text("{")
        assert list(read_handshakes(tmp_path)) == []
        temporary.write_text(json.dumps(dataclasses.asdict(SHAKE)))
    assert list(read_handshakes(tmp_path)) == [SHAKE]


def test_no_folder_no_handshakes(tmp_path: Path) -> None:
    assert list(read_handshakes(tmp_path / "none")) == []


@pytest.mark.parametrize(("value", "folder"), [("/p", Path("/p")), ("", None), (None, None)])
def test_plugin_dir(value: str | None, folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv(contract.ENV_PLUGIN_DIR, value)
    assert contract.plugin_dir() == folder


@pytest.mark.processes
def test_imports_the_standard_library_only() -> None:
    """Every worker of verl and vLLM imports it."""
    probe = (
        "import sys; before = set(sys.modules); import flashrl_cli.contract; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["flashrl_cli"]


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("0.24.0", True),
        ("0.28.0+cpu", True),
        ("0.26.1.dev3+g1234567", True),
        ("0.23.9", False),
        ("0.29.0", False),
        ("1.24", False),
        ("", False),
        ("dev", False),
    ],
)
def test_versions_of_vllm(version: str, known: bool) -> None:
    assert contract.knows_vllm(version) is known
    if known:
        contract.require_vllm(version)
    else:
        with pytest.raises(RuntimeError, match=r"made for vLLM 0\.24 to 0\.28"):
            contract.require_vllm(version)


@pytest.mark.parametrize(
    ("level", "told"),
    [(None, ["WARNING"]), ("info", ["INFO", "WARNING"]), ("DEBUG", ["DEBUG", "INFO", "WARNING"]), ("x", ["WARNING"])],
)
def test_the_plugins_tell_as_much_as_the_variable_asks(
    level: str | None, told: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contract, "logger", functools.cache(contract.logger.__wrapped__))
    monkeypatch.setattr(logging.getLogger("flashrl"), "handlers", [])
    monkeypatch.delenv(contract.ENV_LOGGING, raising=False)
    if level is not None:
        monkeypatch.setenv(contract.ENV_LOGGING, level)
    for name in ("debug", "info", "warning"):
        getattr(contract.logger(), name)("refit %d", 3)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.endswith(f"[{os.getpid()}] refit 3")]
    assert [line.split()[1] for line in lines] == told
    assert (out, len(err.splitlines())) == ("", len(lines))


def test_all_that_wait_for_a_module_are_called_before_it_is_executed(tmp_path, monkeypatch):
    (tmp_path / "awaited.py").write_text("import builtins\nbuiltins.found.append('executed')\n")
    (tmp_path / "other.py").touch()
    found: list[str] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.found", found, raising=False)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    prepares = [functools.partial(found.append, name) for name in ("one", "two", "three")]
    for prepare in (*prepares, prepares[0]):
        contract.before_import("awaited", prepare)
    importlib.import_module("other")
    assert found == []
    importlib.import_module("awaited")
    assert sorted(found[:3]) == ["one", "three", "two"]
    assert found[3:] == ["executed"]
    contract.before_import("awaited", functools.partial(found.append, "at once"))
    assert found[4:] == ["at once"]
    del sys.modules["awaited"], sys.modules["other"]

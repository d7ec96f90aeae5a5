"""`--help` and `--version` of every command: quick, because nothing heavy is imported, and saying something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from flashrl_cli import __version__
from flashrl_cli.cli.app import app

pytestmark = pytest.mark.processes

HEAVY = ("torch", "ray", "vllm", "verl", "transformers", "datasets", "pyarrow", "pydantic", "rich")
PROBE = """
import json, pathlib, sys
from flashrl_cli.cli.app import main
_, report, *arguments = sys.argv
sys.argv = ["flashrl", *arguments]
try:
    main()
finally:
    pathlib.Path(report).write_text(json.dumps(sorted(sys.modules)))
"""


def flashrl(report: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `flashrl ARGUMENTS` in a fresh interpreter, which leaves the names of its modules in `report`."""
    environment = os.environ | {"COLUMNS": "160", "NO_COLOR": "1"}
    command = [sys.executable, "-c", PROBE, str(report), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below `command`, itself first, with the words that call it."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))


def called(path: tuple[str, ...]) -> str:
    return " ".join(("flashrl", *path))


def test_the_tree_of_commands_is_found() -> None:
    assert {(), ("prepare",), ("train",), ("eval",), ("presets", "ls")} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=called)
def test_help_is_light_and_says_what_the_command_does(path: tuple[str, ...], tmp_path: Path) -> None:
    result = flashrl(tmp_path / "modules", *path, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"Usage: {called(path)}" in result.stdout
    assert COMMANDS[path].help.split()[0] in result.stdout
    modules = json.loads((tmp_path / "modules").read_text())
    assert not set(modules) & set(HEAVY)


@pytest.mark.parametrize("path", COMMANDS, ids=called)
def test_every_argument_and_option_is_explained(path: tuple[str, ...]) -> None:
    assert not [parameter.name for parameter in COMMANDS[path].params if not parameter.help]


def test_version_is_light(tmp_path: Path) -> None:
    result = flashrl(tmp_path / "modules", "--version")
    assert (result.returncode, result.stdout) == (0, f"flashrl {__version__}\n")
    assert not set(json.loads((tmp_path / "modules").read_text())) & set(HEAVY)


def test_without_arguments_help_is_printed(tmp_path: Path) -> None:
    result = flashrl(tmp_path / "modules")
    assert result.returncode == 2
    assert "Usage: flashrl" in result.stderr
    assert "prepare" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("prepar", "prepare")])
def test_an_unknown_command_gets_a_suggestion(typed: str, meant: str, tmp_path: Path) -> None:
    result = flashrl(tmp_path / "modules", typed)
    assert result.returncode == 2
    assert f"Did you mean '{meant}'" in result.stderr
    assert result.stdout == ""


def test_an_unknown_command_without_a_likeness_is_a_usage_error(tmp_path: Path) -> None:
    result = flashrl(tmp_path / "modules", "xyzzy")
    assert result.returncode == 2
    assert "xyzzy" in result.stderr

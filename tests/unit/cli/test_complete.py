"""Completion: names from folders, quickly, and wired to the arguments that take them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flashrl_cli import paths
from flashrl_cli.cli import options

HEAVY = {"pydantic", "rich", "torch", "verl", "vllm", "ray", "hydra", "omegaconf"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "tide.yaml").write_text("not: [read")
    for name in ("demo", "tidal"):
        (paths.runs_root() / name).mkdir(parents=True)


def test_names_that_start_so():
    assert options.preset_names("ti") == ["tide", "tiny", "tiny-gpu"]
    assert options.run_names("") == ["demo", "tidal"]
    assert options.preset_and_run_names("tid") == ["tide", "tidal"]


def test_paths_are_left_to_the_shell():
    assert options.preset_and_run_names("./") == []


@pytest.mark.processes
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("flashrl presets show ti", "tide tiny tiny-gpu"),
        ("flashrl presets copy tid", "tide"),
        ("flashrl presets check tid", "tide"),
        ("flashrl presets check tiny tid", "tide"),
        ("flashrl presets diff tid", "tide tidal"),
        ("flashrl presets diff tiny de", "demo"),
    ],
)
def test_a_shell_gets_them(typed, found):
    words = typed.split()
    environment = {"_FLASHRL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.argv = ['flashrl']; from flashrl_cli.cli.app import main; main()"
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert out.stdout.split() == found.split()


@pytest.mark.processes
def test_nothing_heavy_is_imported():
    code = (
        "import sys; from flashrl_cli.cli import options; options.preset_and_run_names('');"
        f"print(*({HEAVY!r} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []

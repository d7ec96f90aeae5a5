"""What tests/conftest.py keeps unit tests from: processes, and the folders of whoever runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashrl_cli import paths


def test_a_process_is_refused() -> None:
    with pytest.raises(pytest.fail.Exception, match="starts a process"):
        subprocess.run([sys.executable, "--version"], check=True)
    with pytest.raises(pytest.fail.Exception, match="starts a process"):
        os.fork()


@pytest.mark.processes
def test_a_marked_test_may_start_one() -> None:
    assert subprocess.run([sys.executable, "--version"], check=True, capture_output=True).stdout


def test_all_places_lie_in_the_tests_own_folder(tmp_path: Path) -> None:
    for place in (paths.data_root(), paths.runs_root(), paths.checkpoints_root()):
        assert place.parent == tmp_path

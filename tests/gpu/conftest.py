"""What the tests on a GPU share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny policy: that of FLASHRL_DATA, or one prepared here."""
    data = Path(os.environ.get("FLASHRL_DATA") or tmp_path_factory.mktemp("data"))
    if not (data / "tiny" / "model").is_dir():
        env = {**os.environ, "FLASHRL_DATA": str(data)}
        subprocess.run([sys.executable, "-m", "flashrl_cli", "prepare", "tiny"], env=env, check=True, timeout=500)
    return data / "tiny" / "model"

"""The doctor's reload test on a real engine: it passes a sound one, and fails one that keeps old weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from flashrl_cli.doctor import reload
from tests.integration.conftest import PATIENCE_S


def test_the_reload_test_tells_a_sound_engine_from_a_broken_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("reload_broken.py")
    subprocess.run(
        [sys.executable, script, "int8", tmp_path], env=reload.environment(tmp_path), check=True, timeout=PATIENCE_S
    )
    found = json.loads((tmp_path / "measured.json").read_text())
    levels = {name: [str(finding.level) for finding in reload.judge("int8", found[name])] for name in found}
    assert levels["sound"] == ["ok"] * 4, found["sound"]
    assert levels["one layer"][1:3] == ["fail", "fail"], found["one layer"]
    assert levels["all"][1:3] == ["fail", "fail"], found["all"]
    holds = found["sound"]["holds"]
    assert (holds["precision"], holds["quantized_layers"], holds["linear_layers"]) == ("int8", 8, 8)

"""The override list of every shipped preset at every precision, word for word; `make golden` writes them anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashrl_cli import paths
from flashrl_cli.config.resolve import load_spec
from flashrl_cli.verl.overrides import Places, overrides

ROOT = paths.presets_root()
PRESETS = sorted(path for path in ROOT.rglob("*.yaml") if "base" not in path.relative_to(ROOT).parts)
PRECISIONS = ("bf16", "fp8", "int8")
CASES = {f"{path.stem}.{precision}.txt": (path, precision) for path in PRESETS for precision in PRECISIONS}


@pytest.mark.parametrize("name", CASES)
def test_overrides(name: str, golden: Callable[[str, str], None]) -> None:
    preset, precision = CASES[name]
    resolved = load_spec(str(preset), rollout=precision)
    places = Places(name="run", data=Path("/data"), checkpoints=Path("/checkpoints/run"))
    golden(f"overrides/{name}", "".join(f"{override}\n" for override in overrides(resolved, places)))


def test_all_lists_are_there_and_no_others() -> None:
    assert len(PRESETS) == 4
    assert sorted(CASES) == sorted(file.name for file in (Path(__file__).parent / "overrides").iterdir())

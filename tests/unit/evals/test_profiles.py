"""A smoothing profile for an evaluation, held against what is evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.evals import request
from flashrl_cli.evals.job import EngineSettings
from tests.saved_files import saved_profile


def check(folder: Path, rollout: str = "int8", file: Path | None = None, **config: Any) -> None:
    made = saved_profile(folder / "p", {"a.rows": [2.0]}, shape={"hidden_size": 64})
    (folder / "config.json").write_text(json.dumps(config))
    request.check(EngineSettings(rollout=rollout, profile=str(file or made)), [folder / "none", folder])


def test_a_profile_that_can_be_applied(tmp_path: Path) -> None:
    check(tmp_path, hidden_size=64)
    check(tmp_path, "fp8", hidden_size=64)


def test_no_profile_asks_nothing(tmp_path: Path) -> None:
    request.check(EngineSettings(rollout="bf16"), [tmp_path])


def test_what_cannot_be_smoothed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bf16 loses nothing") as error:
        check(tmp_path, "bf16")
    assert error.value.hint == "--rollout int8"
    with pytest.raises(InputError, match="cannot be read"):
        check(tmp_path, file=tmp_path / "nothing")
    with pytest.raises(InputError, match="quantized already"):
        check(tmp_path, quantization_config={})
    with pytest.raises(InputError, match=r"of another model than .*hidden_size = 64, and the model has 128"):
        check(tmp_path, hidden_size=128)

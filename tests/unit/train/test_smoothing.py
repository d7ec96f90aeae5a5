"""A run's smoothing profile, held against its model before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.machine.finding import Finding, Level
from flashrl_cli.train import preflight
from flashrl_cli.weights import Weights
from tests.saved_files import saved_profile, saved_tensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An HF folder with a vector of three numbers."""
    saved_tensors(tmp_path / "data/tiny/model/model.safetensors", **{"norm.weight": b"123"})
    (tmp_path / "data/tiny/model/config.json").write_text(json.dumps({"hidden_size": 3}))
    return tmp_path / "data/tiny/model"


def judged(folder: Path, model: Path | None, rows: int = 3, **about: object) -> Finding:
    file = saved_profile(folder / "p.safetensors", {"norm.weight.rows": [2.0] * rows}, **about)
    return preflight.judge_profile(file, model)


def test_a_profile_of_the_model(tmp_path: Path, model: Path) -> None:
    finding = judged(tmp_path, model, fingerprint=Weights(hf=model).fingerprint(), shape={"hidden_size": 3})
    assert finding.level is Level.OK
    assert "of m: 1 tensor" in finding.text


def test_a_profile_of_other_weights_holds(tmp_path: Path, model: Path) -> None:
    finding = judged(tmp_path, model)
    assert finding.level is Level.WARN
    assert f"calibrated on other weights than those in {model}" in finding.text


@pytest.mark.parametrize(
    ("rows", "shape", "why"),
    [(4, {}, "norm.weight as [4, any]"), (3, {"hidden_size": 4}, "hidden_size = 4, and the model has 3")],
)
def test_a_profile_of_another_model(tmp_path: Path, model: Path, rows: int, shape: dict[str, int], why: str) -> None:
    finding = judged(tmp_path, model, rows, shape=shape)
    assert finding.level is Level.FAIL
    assert why in finding.text
    assert "rollout.profile=null" in str(finding.fix)


def test_a_model_that_cannot_be_looked_at(tmp_path: Path) -> None:
    assert judged(tmp_path, None).level is Level.OK
    assert judged(tmp_path, tmp_path / "none").level is Level.OK
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_text("{}")
    assert judged(tmp_path, tmp_path / "bin").level is Level.OK


def test_no_profile(tmp_path: Path) -> None:
    assert preflight.judge_profile(tmp_path / "none", None).text == f"{tmp_path / 'none'} does not exist"
    (tmp_path / "text").write_text("text")
    finding = preflight.judge_profile(tmp_path / "text", None)
    assert (finding.level, finding.name) == (Level.FAIL, "rollout.profile")
    assert "torn" in finding.text


def test_a_run_asks_for_its_own(tmp_path: Path, model: Path) -> None:
    sets = [f"rollout.profile={tmp_path / 'p.safetensors'}"]
    spec = load_spec("tiny", sets=sets).spec
    (finding,) = (one for one in preflight.storage_findings(spec, tmp_path / "data") if one.name == "rollout.profile")
    assert finding.level is Level.FAIL
    judged(tmp_path, None, fingerprint=Weights(hf=model).fingerprint())
    (finding,) = (one for one in preflight.storage_findings(spec, tmp_path / "data") if one.name == "rollout.profile")
    assert finding.level is Level.OK

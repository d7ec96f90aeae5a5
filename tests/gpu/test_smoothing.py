"""A profile applied at refits on a CUDA GPU: the engine holds what a fresh one loads from smoothed weights, bit for
bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import contract
from flashrl_cli.quantize.calibrate import calibrate
from flashrl_cli.weights.profile import Profile
from tests.gpu.test_refit import engine, pytestmark  # noqa: F401 - the marks hold here, too
from tests.integration.test_refit import sequences


@pytest.fixture(scope="session")
def profile(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile of the tiny policy, calibrated on the GPU."""
    out = tmp_path_factory.mktemp("profile") / "tiny.safetensors"
    return calibrate(policy, policy.parent / "train.parquet", samples=64, alpha=None, out=out, say=print).profile


def smoothed(policy: Path, profile: Profile, folder: Path) -> Path:
    """The policy with the profile in its weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(policy, folder)
    weights = load_file(policy / "model.safetensors")
    save_file(
        {name: profile.apply(name, weight).contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_a_refit_with_a_profile(
    policy: Path, profile: Profile, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    rows, _ = sequences(AutoTokenizer.from_pretrained(policy))
    common = {"sequences": rows, "bucket": 24 << 10, "dtype": "bfloat16", "precision": precision}
    ready = smoothed(policy, profile, tmp_path / "smoothed")
    monkeypatch.setenv(contract.ENV_ROLLOUT, contract.RolloutOptions(rotation=0).text())
    fresh = engine({**common, "model": str(ready), "load_format": "auto", "refits": []}, tmp_path / "fresh")
    monkeypatch.setenv(contract.ENV_ROLLOUT, contract.RolloutOptions(profile=str(profile.path)).text())
    refits: dict[str, Any] = {"load_format": "dummy", "refits": [str(policy)] * 2}
    refitted = engine({**common, "model": str(policy), **refits}, tmp_path / "refitted")
    assert refitted["digests"] == fresh["digests"] * 2
    assert refitted["logprobs"] == fresh["logprobs"]
    assert [handshake["smoothed"] for handshake in refitted["holds"]] == [len(profile.names)] * 2
    if precision == "bf16":
        monkeypatch.delenv(contract.ENV_ROLLOUT)
        plain = engine({**common, "model": str(policy), "load_format": "auto", "refits": []}, tmp_path / "plain")
        assert refitted["generated"] == plain["generated"]
        assert refitted["logprobs"] == plain["logprobs"]

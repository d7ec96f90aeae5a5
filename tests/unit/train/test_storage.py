"""What a run reads, and room for what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.machine.finding import Finding
from flashrl_cli.train import preflight

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, and no switches."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf/hub"


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**15, free=count))


def spec(preset: str = "dapo-32b", *sets: str) -> RunSpec:
    return load_spec(preset, sets=sets).spec


def named(name: str, found: list[Finding]) -> Finding:
    (finding,) = (finding for finding in found if finding.name == name)
    return finding


def test_a_model_that_will_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10**12)
    finding = named("model.path", list(preflight.storage_findings(spec(), tmp_path)))
    assert finding.level == "ok"
    assert "Qwen/Qwen2.5-32B will be downloaded" in finding.text
    assert "65.5 GB" in finding.text  # 32.8 G parameters in bfloat16
    free(monkeypatch, 10**10)
    assert named("model.path", list(preflight.storage_findings(spec(), tmp_path))).level == "fail"


def test_a_model_in_the_cache(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert named("model.path", list(preflight.storage_findings(spec(), tmp_path))).level == "fail"
    snapshot = hub / "models--Qwen--Qwen2.5-32B/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert named("model.path", list(preflight.storage_findings(spec(), tmp_path))).level == "ok"


def test_a_model_of_unknown_size(tmp_path: Path) -> None:
    found = list(preflight.storage_findings(spec("dapo-32b", "model.path=some/body"), tmp_path))
    assert named("model.path", found).level == "ok"
    assert not [finding for finding in found if finding.name == "checkpoints"]


def test_a_critic_has_a_model_too(tmp_path: Path) -> None:
    found = spec("gsm8k-0.5b", "critic.path=some/body")
    assert preflight.hub_models(found, tmp_path) == {
        "model.path": "Qwen/Qwen2.5-0.5B-Instruct",
        "critic.path": "some/body",
    }
    assert preflight.hub_models(spec("tiny"), tmp_path) == {}


@pytest.mark.parametrize(("gb", "level"), [(1000, "ok"), (394, "ok"), (300, "warn"), (98, "fail")])
def test_checkpoints(gb: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, gb * 10**9)
    assert named("checkpoints", list(preflight.storage_findings(spec(), tmp_path))).level == level


def test_a_cluster_writes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not [finding for finding in preflight.storage_findings(spec(), tmp_path) if finding.name == "checkpoints"]


def test_parameters(tmp_path: Path) -> None:
    model = tmp_path / "tiny/model"
    model.mkdir(parents=True)
    assert preflight.parameters("prepared:tiny", tmp_path) is None
    (model / "config.json").write_text(json.dumps(CONFIG))
    # two embeddings, and in each layer four square matrices, three of the MLP and two norms; one norm at the end
    expected = 2 * 256 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert preflight.parameters("prepared:tiny", tmp_path) == expected
    (model / "config.json").write_text('{"vocab_size": 259}')
    assert preflight.parameters("prepared:tiny", tmp_path) is None

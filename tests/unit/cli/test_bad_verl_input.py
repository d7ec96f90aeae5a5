"""Bad keys of verl's as people type them, judged by verl's own tree: needs verl's wheel and Hydra, imports no torch."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from flashrl_cli.cli.app import main

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")

PRESET = """\
model: {path: Qwen/Qwen3-0.6B}
data: {train: gsm8k, val: gsm8k, train_batch_size: 64, max_prompt_length: 100, max_response_length: 28}
algorithm: {advantage: grpo, lr: 1e-6, mini_batch_size: 32, micro_batch_size_per_gpu: 4}
rollout: {n: 8, log_prob_micro_batch_size_per_gpu: 4}
trainer: {project: p}
"""

WITHOUT_PREFIX = [
    ("actor_rollout_ref.actor.use_dynamic_bsz=true", "--set verl.actor_rollout_ref.actor.use_dynamic_bsz=…"),
    ("trainer.val_only=true", "keys of verl's own go under verl: --set verl.trainer.val_only=…"),
    ("data.shuffle=false", "--set verl.data.shuffle=…"),
    ("+trainer.val_only=true", "--set verl.trainer.val_only=…"),
    ("+trainer.nothing=1", "--set verl.+trainer.nothing=… adds a key that verl's own tree lacks"),
    ("actor_rollout_ref.actor.optim.lrr=1", "did you mean verl's actor_rollout_ref.actor.optim.lr?"),
    ("actor_rollout_ref.actor.optim.lrr=1", "--set algorithm.lr=…"),
    ("actor_rollout_ref.actor.use_dynamic_bzs=1", "did you mean verl's actor_rollout_ref.actor.use_dynamic_bsz?"),
    ("actor_rollout_ref.actor.grad_clip=1", "verl.actor_rollout_ref.actor.optim.clip_grad"),
    ("nothing.at.all=1", "keys of a preset are name, "),
]
UNDER_VERL = [
    ("verl.actor_rollout_ref.actor.optim.lr=1", "--set algorithm.lr=…"),
    ("verl.actor_rollout_ref.actor.optim.lrr=1", "did you mean actor_rollout_ref.actor.optim.lr"),
    ("verl.actor_rollout_ref.actor.imp_ratio_cap=2", "--tis CAP"),
    ("verl.reward_model.reward_manager=dapo", "reward.manager"),
    ("verl.a.b=1", "verl has no key a.b"),
    ("verl.trainer.val_onlys=true", "did you mean trainer.val_only?"),
    ("verl.+trainer.val_only=true", "write it without the +"),
    ("verl.++trainer.val_only=true", "`++` and `~` before a key of verl's are refused"),
    ("verl.~trainer.val_only=1", "`++` and `~` before a key of verl's are refused"),
]


def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Run `flashrl train --dry-run --preset p.yaml WORDS`; returns its stderr after asserting that it was refused."""
    monkeypatch.setattr(sys, "argv", ["flashrl", "train", "--dry-run", "--preset", "p.yaml", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    stdout, stderr = capfd.readouterr()
    assert (caught.value.code, stdout) == (2, "")
    assert "Traceback" not in stderr
    assert [path.name for path in Path().iterdir()] == ["p.yaml"]
    return stderr


@pytest.fixture(autouse=True)
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.yaml"
    path.write_text(PRESET)
    return path


@pytest.mark.parametrize(("text", "hint"), WITHOUT_PREFIX)
def test_without_the_prefix(capfd, monkeypatch, text, hint):
    told = refused(capfd, monkeypatch, "--set", text)
    assert f"unknown key {text.partition('=')[0]}\n" in told
    assert hint in told


@pytest.mark.parametrize(("text", "hint"), UNDER_VERL)
def test_under_verl(capfd, monkeypatch, text, hint):
    told = refused(capfd, monkeypatch, "--set", text)
    assert f"  --set {text.partition('=')[0]}: " in told
    assert hint in told


def test_a_map_of_verls_at_the_top_of_a_file(capfd, monkeypatch, preset):
    preset.write_text(f"{PRESET}actor_rollout_ref:\n  actor:\n    use_dynamic_bsz: true\n    optim: {{lr: 1}}\n")
    told = refused(capfd, monkeypatch)
    assert "p.yaml:8: unknown key actor_rollout_ref.actor.use_dynamic_bsz\n" in told
    assert "--set verl.actor_rollout_ref.actor.use_dynamic_bsz=…" in told
    assert "p.yaml:9: unknown key actor_rollout_ref.actor.optim.lr\n" in told


def test_a_configuration_of_verls_is_translated_key_by_key(capfd, monkeypatch, preset):
    preset.write_text(
        "algorithm: {adv_estimator: grpo}\n"
        "data: {train_files: x, max_prompt_length: 4}\n"
        "trainer: {nnodes: 1, project_name: x, val_only: true}\n"
    )
    told = refused(capfd, monkeypatch)
    for hint in (
        "algorithm.advantage",
        "data.train",
        "resources.nodes",
        "trainer.project",
        "verl.trainer.val_only",
    ):
        assert f"--set {hint}=…" in told
    missing = next(line for line in told.splitlines() if "not set:" in line)
    assert "data.val" in missing
    assert "algorithm.advantage" not in missing


def test_wrong_keys_of_flashrls_and_of_verls_are_told_together(capfd, monkeypatch, preset):
    sets = ("rolout.n=3", "verl.data.sed=1", "verl.+actor_rollout_ref.actor.optim.wd=1")
    told = refused(capfd, monkeypatch, *(word for text in sets for word in ("--set", text)))
    assert "3 problems\n" in told
    assert "did you mean rollout.n?" in told
    assert "verl has no key data.sed" in told
    assert "FSDPOptimizerConfig has no wd" in told

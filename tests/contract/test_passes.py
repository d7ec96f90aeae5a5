"""What `auto` becomes in a plan: composed once, from the model's shape and the GPU's size, and kept by resumed runs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.config.resolve import Options
from flashrl_cli.errors import InputError
from flashrl_cli.memory.budget import lines
from flashrl_cli.train import launch
from flashrl_cli.train.plan import LaunchPlan, plan_document
from flashrl_cli.verl import compose
from tests.specs import TINY

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")
A, R, M = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "RUNS", "CHECKPOINTS"):
        monkeypatch.setenv(f"FLASHRL_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def plan(preset: str, *sets: str, resume: str = "never", gib: int | None = None, **options: Any) -> LaunchPlan:
    resolved = launch.read(preset, Options(sets=sets))
    gpus = [] if gib is None else [gib << 30]
    return launch.next_plan(resolved, "r", resume=resume, gpu_memory=lambda _: gpus, **options)


def values(found: LaunchPlan) -> dict[str, Any]:
    return {override.key: override.value for override in found.overrides}


@pytest.mark.parametrize("preset", ["dapo-32b", "gsm8k-0.5b", "gsm8k-grpo-0.5b"])
def test_verl_s_configuration_is_composed_once_and_is_that_of_the_plan(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = []
    tree = compose.tree

    def counted(overrides: Any) -> compose.Tree:
        composed.append(overrides)
        return tree(overrides)

    monkeypatch.setattr(compose, "tree", counted)
    found = plan(preset)
    judged = launch.judge(found.resolved, found)
    assert len(composed) == 1
    assert judged.container() == tree([str(override) for override in found.overrides]).container()


def test_a_gpu_that_is_seen_given_or_assumed() -> None:
    model = "model.path=Qwen/Qwen2.5-7B"
    assumed, seen, given = (
        plan("gsm8k-grpo-0.5b", model, *sets, gib=gib)
        for sets, gib in (((), None), ((), 141), (("resources.gpu_memory_gib=24",), 141))
    )
    assert "80 GB assumed" in " ".join(lines(assumed.resolved))
    assert values(seen)[f"{R}.log_prob_max_token_len_per_gpu"] == 32768
    assert values(given)[f"{R}.log_prob_max_token_len_per_gpu"] < 32768
    assert "24.0 GiB (resources.gpu_memory_gib)" in " ".join(lines(given.resolved))


def test_a_model_that_is_not_here_gets_short_passes_and_the_way_to_more(tmp_path: Path) -> None:
    unknown = plan("gsm8k-grpo-0.5b", "model.path=nobody/knows")
    assert values(unknown)[f"{A}.ppo_max_token_len_per_gpu"] == 4096
    assert values(unknown)[f"{M}.enable_gradient_checkpointing"] is True
    assert "`hf download nobody/knows`" in lines(unknown.resolved)[0]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY))
    assert values(plan("gsm8k-grpo-0.5b", f"model.path={model}"))[f"{A}.ppo_max_token_len_per_gpu"] == 32768
    (model / "config.json").write_text(json.dumps(TINY | {"kv_lora_rank": 512}))
    assert "is no plain decoder" in lines(plan("gsm8k-grpo-0.5b", f"model.path={model}").resolved)[0]


def test_without_verl_presets_can_still_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose, "find_spec", lambda _: None)
    resolved, _ = launch.preview("dapo-7b", Options(), lambda _: [])
    assert "verl is not installed" in lines(resolved)[0]


def test_another_training_engine_is_refused_where_it_was_written() -> None:
    found = plan("gsm8k-grpo-0.5b", f"verl.{A}.strategy=megatron")
    with pytest.raises(InputError) as caught:
        launch.judge(found.resolved, found)
    assert [str(problem.where) for problem in caught.value.problems] == [f"--set verl.{A}.strategy"]


def record(found: LaunchPlan) -> None:
    found.attempt_paths.root.mkdir(parents=True)
    found.attempt_paths.plan.write_text(json.dumps(plan_document(found)))


def test_a_resumed_run_keeps_its_passes() -> None:
    first = plan("gsm8k-grpo-0.5b", "model.path=Qwen/Qwen2.5-7B", gib=40)
    record(first)
    again = plan("gsm8k-grpo-0.5b", "model.path=Qwen/Qwen2.5-7B", gib=80, resume="auto")
    fresh = plan("gsm8k-grpo-0.5b", "model.path=Qwen/Qwen2.5-7B", gib=80, resume="never", look_only=True)
    keys = [f"{A}.ppo_max_token_len_per_gpu", f"{R}.log_prob_max_token_len_per_gpu"]
    assert [values(again)[key] for key in keys] == [values(first)[key] for key in keys]
    assert again.spec == first.spec
    assert launch.changes(again) == []
    assert all("the run's attempt before" in line for line in lines(again.resolved) if "rollout" in line)
    assert fresh.attempt == 2
    other = plan("gsm8k-grpo-0.5b", "model.path=Qwen/Qwen2.5-7B", "algorithm.max_tokens_per_gpu=4096", resume="auto")
    assert values(other)[keys[0]] == 4096
    assert launch.plan_hash(other) == launch.plan_hash(first)


def test_the_plan_tells_the_reasons() -> None:
    found = plan("dapo-7b")
    document = plan_document(found)
    assert document["spec"]["algorithm"]["max_tokens_per_gpu"] == values(found)[f"{A}.ppo_max_token_len_per_gpu"]
    assert document["origins"]["model.recompute"].startswith("derived: ")

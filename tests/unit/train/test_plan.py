"""The plan: complete, pure, printable, and a script that a shell reads back word for word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli.config.layers import leaves
from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.train.plan import LaunchPlan, build_plan, default_name, plan_document


def plan(preset: str = "tiny", root: Path = Path("/w"), name: str = "r", **options: str | None) -> LaunchPlan:
    return build_plan(
        load_spec(preset, **options),  # type: ignore[arg-type]
        name=name,
        attempt=2,
        python="/venv/bin/python",
        runs_root=root / "runs",
        checkpoints_root=root / "checkpoints",
        data_root=root / "data",
    )


def test_argv_is_verls_entry_point_with_the_overrides_and_hydras_settings():
    found = plan()
    assert found.argv[:3] == ("/venv/bin/python", "-m", "verl.trainer.main_ppo")
    assert found.argv[3:-2] == tuple(str(override) for override in found.overrides)
    assert found.argv[-2:] == ("hydra.run.dir=/w/runs/r/attempt_2/hydra", "hydra.output_subdir=null")


def test_places():
    found = plan("dapo-32b")
    assert found.cwd == Path("/w/runs/r/attempt_2")
    assert "trainer.default_local_dir=/w/checkpoints/DAPO/r" in found.argv
    assert "trainer.experiment_name=r" in found.argv
    assert "data.train_files=/w/data/dapo-math-17k/train.parquet" in found.argv
    assert found.env["VERL_FILE_LOGGER_PATH"] == "/w/runs/r/attempt_2/metrics.jsonl"


def test_planning_is_repeatable_and_writes_nothing(tmp_path):
    assert plan(root=tmp_path) == plan(root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_document_is_plain_data():
    document = plan_document(plan(tis="2"))
    assert json.loads(json.dumps(document)) == document
    assert document["schema_version"] == 1
    assert (document["preset"], document["name"], document["attempt"]) == ("tiny", "r", 2)
    assert "algorithm.rollout_correction.rollout_is_threshold=2.0" in document["overrides"]
    assert set(document["files"]) == {"run", "attempt", "log", "metrics", "plugins", "plan", "checkpoints"}
    assert not any(override.startswith("hydra.") for override in document["overrides"])
    assert RunSpec.model_validate(document["spec"]) == plan(tis="2").spec
    assert document["origins"]["correction.cap"] == "--tis"
    assert document["origins"].keys() == dict(leaves(document["spec"])).keys()


@pytest.mark.parametrize(
    ("preset", "rollout", "tis", "name"),
    [
        ("tiny", None, None, "tiny-int8-tis2"),
        ("dapo-32b", None, None, "dapo-32b-bf16"),
        ("dapo-32b", "fp8", "8", "dapo-32b-fp8-tis8"),
        ("dapo-32b", "fp8-block", "8", "dapo-32b-fp8-block-tis8"),
        ("dapo-32b", "int8", "1.5", "dapo-32b-int8-tis1.5"),
        ("tiny", "bf16", "off", "tiny-bf16"),
    ],
)
def test_default_names(preset, rollout, tis, name):
    resolved = load_spec(preset, rollout=rollout, tis=tis)
    assert default_name(resolved.spec.name, resolved.spec) == name


def test_default_names_tell_what_else_changes_the_rollouts():
    sets = ["kv_cache=fp8", "lm_head_fp32=true", "profile=/p.safetensors", "mix=0.25"]
    spec = load_spec("tiny", sets=[f"rollout.{text}" for text in sets]).spec
    assert default_name("tiny", spec) == "tiny-int8-kv8-head32-smooth-mix0.25-tis2"

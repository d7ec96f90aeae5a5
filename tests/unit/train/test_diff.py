"""How plans differ: of presets, and of what was recorded."""

from __future__ import annotations

from typing import Any

import pytest

from flashrl_cli import files, paths
from flashrl_cli.config.resolve import Options
from flashrl_cli.errors import InputError
from flashrl_cli.train.diff import compare, document_of

NONE = Options()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def keys(listed: Any) -> list[str]:
    return [difference.key for difference in listed]


def record(run: str, document: dict[str, Any]) -> None:
    files.write_json(paths.runs_root() / run / "attempt_1" / "plan.json", document)


def test_only_what_was_changed_differs_and_consequences_show_in_overrides_and_environment():
    found = compare(document_of("tiny", NONE), document_of("tiny", Options(rollout="bf16", sets=("env.A=1",))))
    assert [(d.key, *d.shown(), d.origin) for d in found.values or ()] == [
        ("rollout.precision", "int8", "bf16", "--rollout"),
        ("env.A", "–", '"1"', "--set env.A"),
    ]
    assert keys(found.overrides) == ["+actor_rollout_ref.rollout.engine_kwargs.vllm.quantization"]
    assert keys(found.environment) == ["FLASHRL_ROLLOUT"]  # int8's weights are sent in bf16


def test_platforms_differ_in_environment():
    found = compare(document_of("tiny", NONE), document_of("tiny", Options(sets=("resources.platform=cuda",))))
    assert keys(found.values) == ["resources.platform"]
    assert "VERL_PLATFORM" in keys(found.environment)


def test_runs_of_other_names_and_places_do_not_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHRL_RUNS", str(tmp_path / "old" / "runs"))
    monkeypatch.setenv("FLASHRL_CHECKPOINTS", str(tmp_path / "old" / "checkpoints"))
    before = document_of("tiny", NONE) | {"name": "tiny-int8-tis2"}
    record("demo", before)
    monkeypatch.setenv("FLASHRL_CHECKPOINTS", str(tmp_path / "new"))
    found = compare(document_of("demo", NONE), document_of("tiny", NONE))
    assert (found.values, found.overrides, found.environment) == ([], [], [])


def test_plans_without_values_are_compared_by_their_overrides():
    old = document_of("tiny", NONE)
    del old["spec"], old["origins"]
    record("demo", old)
    found = compare(document_of("demo", NONE), document_of("tiny", Options(sets=("trainer.steps=3",))))
    assert found.values is None
    assert [(d.key, *d.shown()) for d in found.overrides] == [("trainer.total_training_steps", "15", "3")]


def test_a_presets_name_wins_over_a_runs():
    record("tiny", document_of("tiny", Options(rollout="bf16")))
    assert document_of("tiny", NONE)["spec"]["rollout"]["precision"] == "int8"
    assert document_of(str(paths.runs_root() / "tiny"), NONE)["spec"]["rollout"]["precision"] == "bf16"


def test_what_was_recorded_cannot_be_changed():
    record("demo", document_of("tiny", NONE))
    with pytest.raises(InputError, match="demo is recorded in"):
        document_of("demo", Options(tis="off"))


@pytest.mark.parametrize(("typed", "hint"), [("demoo", "demo"), ("tiiny", "tiny"), ("xyz", "presets are:")])
def test_an_unknown_name_gets_the_nearest_preset_or_run(typed, hint):
    record("demo", document_of("tiny", NONE))
    with pytest.raises(InputError, match="no preset, run or plan") as caught:
        document_of(typed, NONE)
    assert hint in str(caught.value.hint)

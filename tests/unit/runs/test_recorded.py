"""Recorded plans, found by the names that people have for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import files, paths
from flashrl_cli.errors import InputError
from flashrl_cli.runs.store import find_plan, read_plan, run_names

PLAN: dict[str, Any] = {"schema_version": 1, "overrides": [], "env": {}, "files": {}}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """Run `demo` with three attempts, the last without a plan; the working folder is another."""
    monkeypatch.chdir(tmp_path)
    root = paths.runs_root() / "demo"
    for number in (2, 10):
        files.write_json(root / f"attempt_{number}" / "plan.json", PLAN)
    (root / "attempt_11").mkdir()
    return root


@pytest.mark.parametrize(
    ("reference", "attempt"),
    [
        ("demo", 10),
        ("demo/", 10),
        ("demo/attempt_2", 2),
        ("demo/attempt_2/plan.json", 2),
        ("{run}", 10),
        ("{run}/attempt_2", 2),
        ("{run}/attempt_2/plan.json", 2),
    ],
)
def test_found(reference, attempt, run):
    assert find_plan(reference.format(run=run)) == run / f"attempt_{attempt}" / "plan.json"


@pytest.mark.parametrize("reference", ["other", "demo/attempt_11", "demo/attempt_3", ".", "", "demo/attempt_2/x.json"])
def test_not_found(reference, run):
    assert find_plan(reference) is None


def test_a_file_of_the_working_folder(run, tmp_path):
    files.write_json(tmp_path / "old.json", PLAN)
    assert find_plan("old.json") == tmp_path / "old.json"
    assert read_plan(tmp_path / "old.json") == PLAN


def test_names_of_runs(run):
    (run.parent / "a-file").write_text("")
    (run.parent / ".hidden").mkdir()
    (run.parent / "another").mkdir()
    assert run_names() == ["another", "demo"]


def test_no_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHRL_RUNS", str(tmp_path / "nowhere"))
    assert run_names() == []


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[]", "is not a launch plan"),
        ('{"schema_version": 1}', "is not a launch plan"),
        (json.dumps(PLAN | {"schema_version": 2}), "schema version 2"),
    ],
)
def test_what_is_no_plan(text, match, tmp_path):
    file = tmp_path / "plan.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=match):
        read_plan(file)

"""`flashrl presets check` on everything that ships: spec, rules and verl's own tree."""

from __future__ import annotations

import pytest

from flashrl_cli.config.presets import names
from flashrl_cli.config.resolve import Options
from flashrl_cli.train.launch import check


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_all_shipped_presets_pass():
    found = {name: check(name, Options()) for name in names()}
    assert len(found) >= 4
    assert not {name: problems for name, problems in found.items() if problems}


def test_options_are_part_of_what_is_checked():
    assert check("gsm8k-0.5b", Options(rollout="int8", tis="2")) == []
    assert check("gsm8k-0.5b", Options(rollout="int8", tis="-1"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", ["given twice"]),
        ("extends: tiny\nrolout: {n: 2}\n", ["rolout"]),
        ("extends: tiny\nalgorithm: {mini_batch_size: 5}\n", ["mini_batch_size"]),
        ("extends: tiny\nverl: {data.sed: 1}\n", ["data.sed"]),
        ("extends: tiny\nverl:\n  data.sed: 1\n  actor_rollout_ref.actr.x: 2\n", ["data.sed", "actr"]),
    ],
)
def test_reading_the_spec_the_rules_and_verl_each_find_their_own(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    problems = check("mine.yaml", Options())
    assert all(str(problem.where).startswith("mine.yaml:") for problem in problems)
    assert [word for word in words if not any(word in problem.message for problem in problems)] == []


def test_an_unknown_preset_is_a_problem_too():
    (problem,) = check("dapo32b", Options())
    assert "dapo-32b" in str(problem.hint)

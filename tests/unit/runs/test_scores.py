"""The best step is told by the best evidence, and only by evidence of the weights that are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.runs.saved import Scores, saved_steps, scores
from tests.run_lab import Lab

REWARD = "critic/score/mean"
ACCURACY = "val-core/gsm8k/acc/mean@1"


def found(lab: Lab) -> Scores | None:
    return scores(lab.run, saved_steps(lab.run.checkpoints, critic=False))


def test_without_evidence_there_is_no_best(lab: Lab) -> None:
    lab.save(1, 2)
    assert found(lab) is None


def test_an_evaluation_beats_validation_beats_reward(lab: Lab) -> None:
    lab.save(1, 2, 3)
    lab.log({1: {REWARD: 0.9}, 2: {REWARD: 0.2}, 3: {REWARD: 0.3}})
    assert found(lab) == Scores("reward", {1: 0.9, 2: 0.2, 3: 0.3})
    lab.log({1: {REWARD: 0.9}, 2: {REWARD: 0.2, ACCURACY: 0.5}, 3: {REWARD: 0.3, ACCURACY: 0.4}})
    assert found(lab) == Scores("validation", {2: 0.5, 3: 0.4})
    lab.evaluate({1: 0.1, 3: 0.6})
    assert found(lab) == Scores("evaluation", {1: 0.1, 3: 0.6})


def test_of_equals_the_later_is_better() -> None:
    assert Scores("reward", {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.1}).ranked() == [3, 2, 1, 4]


def test_steps_that_are_gone_or_hold_no_weights_do_not_count(lab: Lab) -> None:
    lab.save(1, 2, 3)
    lab.log({step: {REWARD: step / 10} for step in (1, 2, 3, 4)})
    shutil.rmtree(lab.run.checkpoints / "global_step_2")
    (lab.run.checkpoints / "global_step_3" / "actor" / "model_world_size_2_rank_0.pt").unlink()
    assert found(lab) == Scores("reward", {1: 0.1})


def test_an_evaluation_of_earlier_weights_is_none(lab: Lab) -> None:
    lab.save(1, 2)
    lab.log({1: {REWARD: 0.1}, 2: {REWARD: 0.2}})
    lab.evaluate({1: 0.9}, age=3600)
    assert found(lab) == Scores("reward", {1: 0.1, 2: 0.2})


def test_the_newest_evaluation_counts_and_of_it_the_runs_own_rows(lab: Lab, tmp_path: Path) -> None:
    lab.save(1, 2)
    lab.evaluate({1: 0.5}, age=-5)
    lab.evaluate({2: 0.4}, folder=lab.run.checkpoints.parent, age=-9)
    assert found(lab) == Scores("evaluation", {2: 0.4})
    other = Lab(type(lab.run)("q", tmp_path / "q", lab.run.checkpoints.parent / "q"))
    other.evaluate({1: 1.0, 2: 1.0}, folder=lab.run.checkpoints.parent, age=-9)
    assert found(lab) == Scores("evaluation", {1: 0.5})


def test_a_folder_under_another_path_is_the_same(lab: Lab, tmp_path: Path) -> None:
    lab.save(1)
    lab.evaluate({1: 0.5})
    moved = tmp_path / "disk"
    lab.run.checkpoints.rename(moved)
    lab.run.checkpoints.symlink_to(moved)
    assert found(lab) == Scores("evaluation", {1: 0.5})


def test_of_several_data_sets_the_first_counts(lab: Lab) -> None:
    lab.save(1, 2)
    file = lab.evaluate({1: 0.5, 2: 0.4})
    document = json.loads(file.read_text())
    document["datasets"] = [{"name": "gsm8k"}, {"name": "aime24"}]
    rows = [{**row, "dataset": "gsm8k"} for row in document["results"]]
    others = [{**row, "dataset": "aime24", "accuracy": 0.0} for row in rows]
    file.write_text(
        json.dumps({**document, "results": [row for pair in zip(others, rows, strict=True) for row in pair]})
    )
    assert found(lab) == Scores("evaluation", {1: 0.5, 2: 0.4})


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"results": [5]}',
        '{"results": [], "datasets": []}',
        "[]",
        "{}",
        '{"results": [{"step": 1}]}',
        '{"results": 5}',
    ],
)
def test_a_damaged_evaluation_is_named(text: str, lab: Lab) -> None:
    lab.save(1)
    lab.evaluate({}).write_text(text)
    with pytest.raises(InputError, match=r"eval\.json is no evaluation"):
        found(lab)

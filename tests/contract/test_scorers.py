"""Scorers that flashrl adds to verl's: what verl's reward managers call, with the plugin applied."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from flashrl_cli.contract import EXACT_SOURCE
from flashrl_cli.data import truths
from flashrl_cli.data.rows import BadRows
from flashrl_cli.data.sources import GymSource
from flashrl_cli.evals import grade
from flashrl_cli.evals.questions import Question
from flashrl_cli.plugins import scorers

pytestmark = pytest.mark.filterwarnings("ignore")
MANAGERS = "verl.experimental.reward_loop.reward_manager"
PROBE = f"""
import importlib
from flashrl_cli.plugins import scorers
early = importlib.import_module("{MANAGERS}.naive")
scorers.apply()
scorers.apply()
import verl.utils.reward_score as verls
late = importlib.import_module("{MANAGERS}.dapo")
for module in (early, late):
    assert module.default_compute_score is verls.default_compute_score
score = verls.get_default_compute_score("naive")
right = score(data_source="{EXACT_SOURCE}", solution_str="Paris", ground_truth="Paris", extra_info=None)
assert right == {{"score": 1.0, "acc": 1.0}}
assert score("{EXACT_SOURCE}", "Rome", "Paris", {{}}, sandbox_fusion_url=None)["score"] == 0.0
assert score("openai/gsm8k", "#### 72", "72") == 1.0
try:
    score("mine", "1", "1")
except NotImplementedError:
    print("done")
"""


def test_verls_reward_managers_call_them_whenever_they_were_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith("done\n"), done.stderr


@pytest.mark.parametrize(
    ("response", "truth", "points"),
    [
        ("Paris", "Paris", 1.0),
        (" Paris\n", "Paris", 1.0),
        ("<think>Rome? No.</think>\n\nParis", "Paris", 1.0),
        ("Paris.", "Paris", 0.0),
        ("paris", "Paris", 0.0),
        ("Paris</think>", "Paris", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_exact_text_is_scored_in_training_and_evaluation(response: str, truth: str, points: float) -> None:
    assert scorers.compute_score(EXACT_SOURCE, response, truth) == {"score": points, "acc": points}
    [found] = grade.grade_all([(Question([], EXACT_SOURCE, truth, None), response)])
    assert (found.score, found.correct, found.flexible, found.problem) == (points, points == 1.0, None, None)


def test_truths_are_scored_as_right_answers() -> None:
    assert truths.unpaid([(EXACT_SOURCE, "Paris"), (EXACT_SOURCE, "x" * 10_000)]).keys() == {1}


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="needs reasoning-gym, an extra")
def test_every_task_of_reasoning_gym_is_generated_and_pays_for_its_answers() -> None:
    """The same rows each time, whose literal gives its scorer what it needs; 5 of 105 tasks name no answer."""
    from reasoning_gym.factory import DATASETS

    tasks = sorted(DATASETS.keys() - {"composite"})
    source = GymSource(f"rg:{','.join(tasks)}", 2 * len(tasks), 3)
    bad = BadRows()
    rows = [row for _, row in source.rows("train", bad)]
    assert not bad.problems()
    assert {row["task"] for row in rows} == set(tasks)
    assert sum(row["answer"] is None for row in rows) == 2 * 5
    again = GymSource("rg:codeio,list_functions,chain_sum", 6, 3)
    first = {(row["task"], row["question"]) for row in rows}
    assert {(row["task"], row["question"]) for _, row in again.rows("train", bad)} <= first
    for row in rows:
        junk = scorers.compute_score(f"reasoning_gym/{row['task']}", "no idea", "", {"entry": row["entry"]})
        assert junk["acc"] == 0.0


def test_another_version_of_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: Any = importlib.import_module("importlib.metadata")
    monkeypatch.setattr(versions, "version", lambda _: "0.9.2")
    with pytest.raises(RuntimeError, match=r"0\.9\.1 only"):
        scorers.apply()

"""Scorers that flashrl adds to verl's: what verl's reward managers call, with the plugin applied."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest

from flashrl_cli.contract import EXACT_SOURCE
from flashrl_cli.data import truths
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
assert score(data_source="{EXACT_SOURCE}", solution_str="Paris", ground_truth="Paris", extra_info=None) == 1.0
assert score("{EXACT_SOURCE}", "Rome", "Paris", {{}}, sandbox_fusion_url=None) == 0.0
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
    assert scorers.compute_score(EXACT_SOURCE, response, truth) == points
    [found] = grade.grade_all([(Question([], EXACT_SOURCE, truth, None), response)])
    assert (found.score, found.correct, found.flexible, found.problem) == (points, points == 1.0, None, None)


def test_truths_are_scored_as_right_answers() -> None:
    assert truths.unpaid([(EXACT_SOURCE, "Paris"), (EXACT_SOURCE, "x" * 10_000)]).keys() == {1}


def test_another_version_of_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: Any = importlib.import_module("importlib.metadata")
    monkeypatch.setattr(versions, "version", lambda _: "0.9.2")
    with pytest.raises(RuntimeError, match=r"0\.9\.1 only"):
        scorers.apply()

"""Sentences: what they say, and that none says more than its p-value allows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.errors import BelowThreshold, InputError, Problem
from flashrl_cli.evals import verdicts
from flashrl_cli.evals.verdicts import Entry, compare, on_steps, p_text, points, understated
from flashrl_cli.runs.checkpoints import Skipped
from tests.graded import checkpoint, entry, evaluated, single

CORRECTED = "p-values and intervals are corrected for having picked the best of several steps"


def told(*right: int, questions: int = 1000, baseline: Entry | None = None) -> list[str]:
    run = [entry("a", 20 * n, single(count, questions - count)) for n, count in enumerate(right)]
    return on_steps(compare(run, baseline))


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0, "p < 0.001"), (0.00099, "p < 0.001"), (0.001, "p = 0.001"), (0.0123, "p = 0.012"), (0.0496, "p = 0.0496"), (0.4, "p = 0.40"),
     (1.0, "p = 1.00")],
)  # fmt: skip
def test_p(p: float, text: str) -> None:
    assert p_text(p) == text


def test_points() -> None:
    assert (points(0.1214), points(-0.0001), points(-0.02)) == ("12.1", "0.0", "-2.0")


def test_a_rise() -> None:
    first, clear, last = told(300, 420, 430, 500)
    assert first.startswith("gsm8k: step 60 beats step 0 by 20.0 points (95 % 1")
    assert first.endswith("), p < 0.001")
    assert clear == "gsm8k: step 60 beats every other step, p < 0.001"
    assert last == CORRECTED


def test_one_other_step_is_beaten_by_so_much() -> None:
    assert any(s.startswith("gsm8k: step 40 beats step 20 by 8.0 points (95 % ") for s in told(300, 420, 500))


def test_one_later_step_needs_no_correction() -> None:
    (only,) = told(300, 420)
    assert "step 20 beats step 0 by 12.0 points" in only


def test_within_noise() -> None:
    assert "gsm8k: 3 steps are within noise of the best (80): 40, 60, 100" in told(300, 400, 498, 499, 500, 497)
    assert "gsm8k: step 40 and step 60 are not distinguishable" in told(300, 400, 498, 500)


def test_no_rise() -> None:
    said = told(300, 302, 301)
    assert said[0].startswith("gsm8k: step 20, the best, is not distinguishable from step 0: 0.2 points (95 % -")
    assert said[0].endswith("p = 1.00")


def test_a_fall() -> None:
    assert told(500, 300, 290)[:2] == [
        "gsm8k: step 0, the first, has the highest accuracy",
        "gsm8k: step 0 beats every other step, p < 0.001",
    ]
    assert told(500, 300)[1].startswith("gsm8k: step 0 beats step 20 by 20.0 points")


def test_baselines() -> None:
    better, worse, like = (entry("b", 7, single(right, 1000 - right)) for right in (600, 200, 501))
    beaten = "gsm8k: step 20 beats the baseline (b step 7) by 30.0 points (95 % "
    assert any(s.startswith(beaten) for s in told(300, 500, baseline=worse))
    short = "gsm8k: step 20, the best, falls short of the baseline (b step 7) by 10.0 points (95 % 7"
    assert any(s.startswith(short) for s in told(300, 500, baseline=better))
    alike = "gsm8k: step 20, the best, is not distinguishable from the baseline (b step 7): -0.1 points"
    assert any(s.startswith(alike) for s in told(300, 500, baseline=like))


def test_a_beaten_baseline_is_not_within_noise() -> None:
    """Against the baseline alone it takes less to be sure than of all pairs of steps: the two sentences must agree."""
    run = [entry("a", 20 * n, single(right, 1000 - right)) for n, right in enumerate((300, 500, 500, 492, 500, 500))]
    said = on_steps(compare(run, run[3]))
    assert any(s.startswith("gsm8k: step 100 beats the baseline (step 60) by 0.8 points") for s in said)
    assert "gsm8k: 3 steps are within noise of the best (100): 20, 40, 80" in said


def test_few_questions() -> None:
    (said,) = [s for s in told(10, 18, questions=30) if "too few" in s]
    assert said.startswith("gsm8k: 30 questions are too few to tell a difference of 5 points: the intervals reach 1")
    assert not any("too few" in s for s in told(300, 310))


def test_several_runs_are_named() -> None:
    runs = [[entry(run, step, single(3 + step, 7 - step)) for step in (0, 1)] for run in "ab"]
    said = on_steps([c for run in runs for c in compare(run)])
    assert [s.partition(": ")[0] for s in said] == ["a, gsm8k", "a, gsm8k", "b, gsm8k", "b, gsm8k"]


def test_nothing_to_say() -> None:
    assert on_steps([]) == []


@given(st.lists(st.integers(0, 40), min_size=2, max_size=5))
def test_beats_is_said_below_5_percent_alone(right: list[int]) -> None:
    found = compare([entry("a", n, single(count, 40 - count)) for n, count in enumerate(right)])
    said = on_steps(found)
    beats = [s for s in said if " beats " in s]
    for sentence in beats:
        written = re.search(r"p ([<=]) ([\d.]+)$", sentence)
        assert written
        assert float(written[2]) <= 0.05
    first = [c.difference for c in found if c.against == "first"]
    assert any("beats step 0 by" in s for s in beats) == any(d.significant for d in first)


def loosely(right: int, loose: int, count: int, run: str = "a", step: int | None = 20) -> Entry:
    """`right` by the strict scorer, `loose` by the flexible extractor."""
    strict = evaluated(checkpoint(run, step), single(right, count - right))
    flexible = evaluated(checkpoint(run, step), single(right, count - right), flexible=True).grades[:loose]
    none = evaluated(checkpoint(run, step), single(right, count - right), flexible=False).grades[loose:]
    object.__setattr__(strict, "grades", (*flexible, *none))
    return Entry(run, step, strict)


def test_strict_understates() -> None:
    (said,) = understated([loosely(50, 52, 100, step=0), loosely(50, 90, 100)])
    assert said == (
        "gsm8k: the strict accuracy understates: at step 20 the right answer is given 40.0 points more often (flexible) "
        "than in the form that the scorer asks for"
    )


def test_strict_does_not_understate() -> None:
    assert list(understated([loosely(50, 53, 100)])) == [], "chance is not ruled out"
    assert list(understated([loosely(90, 50, 100)])) == [], "it does not understate"
    assert list(understated([entry("a", 0, single(1, 9))])) == [], "no such extractor"


def test_strict_understates_in_one_of_several_runs() -> None:
    (said,) = understated([loosely(50, 52, 100), loosely(50, 90, 100, run="b")])
    assert "at b step 20" in said


BEST_EARLY = (entry("a", 0, single(1, 3)), entry("a", 20, single(4, 0)), entry("a", 100, single(2, 2)))


def judged(least: float, *entries: Entry, beside: tuple[Path, ...] = (), skipped: tuple[Skipped, ...] = ()) -> Any:
    return verdicts.judge(least, entries, beside=beside, skipped=skipped)


def shown(threshold: verdicts.Threshold) -> list[tuple[str, bool]]:
    return [(one.where, one.passed) for one in threshold.judged]


def test_a_threshold_judges_what_training_ended_with() -> None:
    """Neither a base nor a step that was better once; steps by number, each run and each model by itself, every data set."""
    other = (
        entry("b", 7, single(4, 0)),
        entry("model", None, single(1, 3)),
        entry("model", None, single(3, 1), "math"),
    )
    found = judged(0.5, *BEST_EARLY, *other)
    assert shown(found) == [
        ("a step 100, gsm8k", True),
        ("b step 7, gsm8k", True),
        ("model, gsm8k", False),
        ("model, math", True),
    ]
    assert not found.passed
    with pytest.raises(BelowThreshold, match=r"--fail-under 0\.5 is not reached") as caught:
        found.require()
    assert list(caught.value.problems) == [Problem("accuracy 0.25 is below 0.5", "model, gsm8k")]
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("least", "passed"), [(0, True), (0.5, True), (0.5 + 1e-13, True), (0.5001, False), (1, False)]
)
def test_equal_is_enough(least: float, passed: bool) -> None:
    found = judged(least, *BEST_EARLY)
    assert found.passed is passed
    if passed:
        found.require()


def test_a_mean_of_means_is_not_below_the_number_it_is() -> None:
    """0.1 + 0.7 and their like: 7 of 10 right, twice, sum to less than 0.7 times two in binary."""
    thirds = [[True, True, False]] * 3
    assert judged(2 / 3, entry("m", None, thirds)).passed
    tenths = [[True] * 7 + [False] * 3, [True] * 7 + [False] * 3, [True] * 7 + [False] * 3]
    assert judged(0.7, entry("m", None, tenths)).passed


def test_base_and_baseline_are_not_judged_unless_they_are_all() -> None:
    start = BEST_EARLY[0]
    beside = (start.result.checkpoint.path,)
    assert shown(judged(0.5, start, BEST_EARLY[2], beside=beside)) == [("a step 100, gsm8k", True)]
    assert shown(judged(0.5, start, beside=beside)) == [("a step 0, gsm8k", False)]


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        ("/checkpoints/a/global_step_101", True),
        ("/checkpoints/a/global_step_101/actor/huggingface", True),
        ("/checkpoints/a/global_step_100/actor", True),  # one of its data sets is missing
        ("/checkpoints/other/global_step_1", True),
        ("/checkpoints/a/global_step_99", False),  # pruned, or torn: a newer one was judged
        ("/checkpoints/a/global_step_9", False),  # by number, not by name
        ("/checkpoints/a/global_step_101/critic", False),
        ("/checkpoints/a/global_step_101/data.pt", False),
        ("/checkpoints/a/notes.txt", False),
    ],
)
def test_what_should_have_been_judged_and_could_not_be_does_not_pass(path: str, missing: bool) -> None:
    found = judged(0.5, *BEST_EARLY, skipped=(Skipped(Path(path), "torn"),))
    assert found.passed is not missing
    if missing:
        with pytest.raises(BelowThreshold) as caught:
            found.require()
        assert list(caught.value.problems) == [Problem("was not evaluated: torn", path)]


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_model_that_could_not_be_evaluated_does_not_pass(name: str, tmp_path: Path) -> None:
    skipped = Skipped(tmp_path, "no weights")
    assert judged(0.5, *BEST_EARLY, skipped=(skipped,)).passed
    (tmp_path / name).write_text("{}")
    assert not judged(0.5, *BEST_EARLY, skipped=(skipped,)).passed


@pytest.mark.parametrize("text", ["0", "1", "0.5", "1e-3", " 0.25 ", "1.0"])
def test_a_share_is_taken(text: str) -> None:
    assert verdicts.share("--fail-under", text) == float(text)


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("80", "0.8"),
        ("80%", "0.8"),
        ("62.5 %", "0.625"),
        ("1.5", "0.015"),
        ("101", "0.5"),
        ("-0.1", "0.5"),
        ("nan", "0.5"),
        ("inf", "0.5"),
        ("", "0.5"),
        ("best", "0.5"),
        ("0,5", "0.5"),
    ],
)
def test_what_is_no_share_is_refused(text: str, instead: str) -> None:
    with pytest.raises(InputError, match="a share between 0 and 1") as caught:
        verdicts.share("--fail-under", text)
    assert caught.value.hint == f"--fail-under {instead}"

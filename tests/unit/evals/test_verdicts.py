"""Which steps are compared, what is said of them, and what a threshold judges: nothing claims more than its p-value."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.errors import BelowThreshold, InputError, Problem
from flashrl_cli.evals import verdicts
from flashrl_cli.evals.results import Entry
from flashrl_cli.evals.stats import holm, mcnemar
from flashrl_cli.evals.verdicts import (
    Comparison,
    compare,
    compare_models,
    on_models,
    on_steps,
    p_text,
    points,
    understated,
)
from flashrl_cli.runs.checkpoints import Skipped
from tests.graded import checkpoint, data, entry, evaluated, single


def steps(*right: int, questions: int = 100, run: str = "a") -> list[Entry]:
    """Steps 0, 10, … with so many right; the questions that a step gets right, every better one gets right too."""
    return [entry(run, 10 * n, single(count, questions - count)) for n, count in enumerate(right)]


def of(found: list[Comparison], against: str) -> list[Comparison]:
    return [c for c in found if c.against == against]


def test_the_best_is_compared_with_the_first_and_with_every_later_step() -> None:
    found = compare(steps(20, 60, 50, 58))
    assert {c.best_step for c in found} == {10}
    (first,) = of(found, "first")
    assert (first.other_step, first.among, first.method, first.questions) == (0, 3, "mcnemar", 100)
    assert first.difference.value == pytest.approx(0.4)
    assert first.difference.p == mcnemar(40, 0)
    assert first.difference.adjusted == pytest.approx(3 * mcnemar(40, 0))
    others = of(found, "step")
    assert [(c.other_step, c.among) for c in others] == [(20, 3), (30, 3)]
    assert [c.difference.value for c in others] == pytest.approx([0.1, 0.02])
    ps = holm([mcnemar(10, 0), mcnemar(2, 0), mcnemar(0, 8)])
    assert [c.difference.adjusted for c in others] == pytest.approx(ps[:2])


def test_of_equal_steps_the_later_is_the_best() -> None:
    assert {c.best_step for c in compare(steps(20, 50, 50))} == {20}


def test_when_the_first_is_the_best_it_is_compared_with_all() -> None:
    found = compare(steps(60, 50, 30))
    assert [(c.against, c.best_step, c.other_step, c.among) for c in found] == [("step", 0, 10, 3), ("step", 0, 20, 3)]
    assert [c.difference.value for c in found] == pytest.approx([0.1, 0.3])


def test_baseline_of_another_run() -> None:
    found = of(compare(steps(20, 60), entry("b", 7, single(30, 70))), "baseline")
    assert [(c.other, c.other_step, c.among) for c in found] == [("b step 7", 7, 2)]
    assert found[0].difference.value == pytest.approx(0.3)


def test_baseline_that_is_a_step_of_the_run() -> None:
    run = steps(20, 60, 40)
    (found,) = of(compare(run, run[2]), "baseline")
    assert (found.other, found.among) == ("step 20", 2)
    assert of(compare(run, run[1]), "baseline") == [], "the best is the baseline"
    assert compare(run[:1], run[0]) == []


def test_several_samples_are_compared_by_bootstrap() -> None:
    good = [[True, True], [True, False]] * 20
    found = compare([entry("a", 0, [[False, False], [True, False]] * 20), entry("a", 5, good)])
    (first,) = found
    assert first.method == "bootstrap"
    assert first.difference.value == pytest.approx(0.5)
    assert first.difference.significant


def test_one_sample_against_several_is_no_mcnemar() -> None:
    (found,) = compare([entry("a", 0, single(2, 2)), entry("a", 5, [[True, False]] * 4)])
    assert found.method == "bootstrap"
    assert found.difference.value == 0


def test_different_questions_are_refused() -> None:
    ours, shorter = entry("a", 0, single(2, 2)), entry("a", 5, single(2, 1))
    with pytest.raises(InputError, match="did not answer the same questions"):
        compare([ours, shorter])
    with pytest.raises(InputError, match="cannot be compared"):
        compare([ours], entry("b", 5, single(2, 2), "math500"))
    whole = evaluated(checkpoint("a", 0), single(2, 1))
    torn = dataclasses.replace(whole, responses=whole.responses[:2], grades=whole.grades[:2])
    assert torn.data == data(3)
    with pytest.raises(InputError, match="did not answer the same questions"):
        compare([Entry("a", 0, whole), Entry("a", 1, torn)])


def test_document_is_plain_data() -> None:
    for one in compare(steps(20, 60, 40)):
        plain = json.loads(json.dumps(one.document()))
        assert plain["difference"]["p"] <= plain["difference"]["adjusted"]
        assert plain["significant"] is one.difference.significant


def test_more_steps_make_a_choice_less_certain() -> None:
    found = [of(compare(steps(40, *[40] * more, 52)), "first")[0].difference for more in range(4)]
    assert all(a.adjusted < b.adjusted and a.lo > b.lo for a, b in pairwise(found))


CORRECTED = "p-values and intervals are corrected for having picked the best of several steps"


def said(*right: int, questions: int = 1000, baseline: Entry | None = None) -> list[str]:
    run = [entry("a", 20 * n, single(count, questions - count)) for n, count in enumerate(right)]
    return on_steps(compare(run, baseline))


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.0, "p < 0.001"), (0.00099, "p < 0.001"), (0.001, "p = 0.001"), (0.0123, "p = 0.012"), (0.0496, "p = 0.0496"),
        (0.4, "p = 0.40"), (1.0, "p = 1.00"),
    ],
)  # fmt: skip
def test_p(p: float, text: str) -> None:
    assert p_text(p) == text


def test_points() -> None:
    assert (points(0.1214), points(-0.0001), points(-0.02)) == ("12.1", "0.0", "-2.0")


SENTENCES = {
    "300 420": "step 20 beats step 0 by 12.0 points (95 % *), p < 0.001",
    "300 420 430 500": "step 60 beats step 0 by 20.0 points (95 % 1*), p < 0.001",
    "300 420 430 501": "step 60 beats every other step, p < 0.001",
    "300 420 500": "step 40 beats step 20 by 8.0 points (95 % *",
    "300 400 498 499 500 497": "3 steps are within noise of the best (80): 40, 60, 100",
    "300 400 498 500": "step 40 and step 60 are not distinguishable",
    "300 302 301": "step 20, the best, is not distinguishable from step 0: 0.2 points (95 % -*, p = 1.00",
    "500 300 290": "step 0, the first, has the highest accuracy",
    "500 310 290": "step 0 beats every other step, p < 0.001",
    "500 300": "step 0 beats step 20 by 20.0 points *",
    "300 500 200 behind": "step 20 beats the baseline (b step 7) by 30.0 points (95 % *",
    "300 500 600 ahead": "step 20, the best, falls short of the baseline (b step 7) by 10.0 points (95 % 7*",
    "300 500 501 alike": "step 20, the best, is not distinguishable from the baseline (b step 7): -0.1 points *",
}
"""By how many of 1,000 questions steps 0, 20, … have right; a word marks that the last number is a baseline's."""


@pytest.mark.parametrize(("right", "sentence"), SENTENCES.items())
def test_sentences(right: str, sentence: str) -> None:
    counts = [int(word) for word in right.split() if word.isdecimal()]
    baseline = None if right[-1].isdecimal() else entry("b", 7, single(counts[-1], 1000 - counts.pop()))
    found = said(*counts, baseline=baseline)
    assert any(fnmatch.fnmatchcase(one, f"gsm8k: {sentence}") for one in found)
    assert (found[-1] == CORRECTED) is (len(counts) > 2 or baseline is not None)


def test_a_beaten_baseline_is_not_within_noise() -> None:
    """Against the baseline alone it takes less to be sure than of all pairs of steps: the two sentences must agree."""
    run = [entry("a", 20 * n, single(right, 1000 - right)) for n, right in enumerate((300, 500, 500, 492, 500, 500))]
    sentences = on_steps(compare(run, run[3]))
    assert any(s.startswith("gsm8k: step 100 beats the baseline (step 60) by 0.8 points") for s in sentences)
    assert "gsm8k: 3 steps are within noise of the best (100): 20, 40, 80" in sentences


def test_few_questions() -> None:
    (sentence,) = [s for s in said(10, 18, questions=30) if "too few" in s]
    assert sentence.startswith(
        "gsm8k: 30 questions are too few to tell a difference of 5 points: the intervals reach 1"
    )
    assert not any("too few" in s for s in said(300, 310))


def test_several_runs_are_named() -> None:
    runs = [[entry(run, step, single(3 + step, 7 - step)) for step in (0, 1)] for run in "ab"]
    sentences = on_steps([c for run in runs for c in compare(run)])
    assert [s.partition(": ")[0] for s in sentences] == ["a, gsm8k", "a, gsm8k", "b, gsm8k", "b, gsm8k"]


@given(st.lists(st.integers(0, 40), min_size=2, max_size=5))
def test_beats_is_said_below_5_percent_alone(right: list[int]) -> None:
    found = compare([entry("a", n, single(count, 40 - count)) for n, count in enumerate(right)])
    beats = [s for s in on_steps(found) if " beats " in s]
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
    what = "the right answer is given 40.0 points more often (flexible) than in the form that the scorer asks for"
    for run, name in (("a", "step 20"), ("b", "b step 20")):
        assert list(understated([loosely(50, 52, 100, step=0), loosely(50, 90, 100, run=run)])) == [
            f"gsm8k: the strict accuracy understates: at {name} {what}"
        ]


def test_strict_does_not_understate() -> None:
    assert list(understated([loosely(50, 53, 100)])) == [], "chance is not ruled out"
    assert list(understated([loosely(90, 50, 100)])) == [], "it does not understate"
    assert list(understated([entry("a", 0, single(1, 9))])) == [], "no such extractor"


BEST_EARLY = (entry("a", 0, single(1, 3)), entry("a", 20, single(4, 0)), entry("a", 100, single(2, 2)))


def judged(least: float, *entries: Entry, beside: tuple[Path, ...] = (), skipped: tuple[Skipped, ...] = ()) -> Any:
    return verdicts.judge(least, entries, beside=beside, skipped=skipped)


def shown(threshold: verdicts.Threshold) -> list[tuple[str, bool]]:
    return [(one.where, one.passed) for one in threshold.judged]


def test_a_threshold_judges_what_training_ended_with() -> None:
    """Neither a base nor a step that was better once; each run and each model by itself, on every data set."""
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


def models(**right: int) -> list[Entry]:
    """A model for each name, with so many of 100 questions right."""
    return [entry(name, None, single(count, 100 - count)) for name, count in right.items()]


def test_models_are_compared_with_the_best_of_them_in_all_pairs() -> None:
    found = compare_models(models(a=40, b=70, c=68, d=20))
    assert [(c.best, c.other, c.against, c.among, c.method) for c in found] == [
        ("b", other, "model", 6, "mcnemar") for other in ("c", "a", "d")
    ]
    assert [c.difference.value for c in found] == pytest.approx([0.02, 0.3, 0.5])
    counts = {(a, b): abs(x - y) for (a, x), (b, y) in combinations({"a": 40, "b": 70, "c": 68, "d": 20}.items(), 2)}
    adjusted = dict(zip(counts, holm([mcnemar(n, 0) for n in counts.values()]), strict=True))
    wanted = [adjusted["b", "c"], adjusted["a", "b"], adjusted["b", "d"]]
    assert [c.difference.adjusted for c in found] == pytest.approx(wanted)


def test_of_equal_models_the_first_is_the_best() -> None:
    assert [(c.best, c.other) for c in compare_models(models(a=5, b=7, c=7))] == [("b", "c"), ("b", "a")]


def test_sentences_on_models() -> None:
    close = on_models(compare_models(models(a=40, b=70, c=68)))
    assert close[0].startswith("gsm8k: b beats a by 30.0 points (95 % ")
    assert close[1].startswith("gsm8k: b, the best, is not distinguishable from c: 2.0 points (95 % -")
    assert close[-1] == "p-values and intervals are corrected for all pairs of models"
    clear = on_models(compare_models(models(a=40, b=90, c=60)))
    assert clear[0] == "gsm8k: b beats every other model, p < 0.001"
    two = on_models(compare_models(models(a=40, b=90)))
    assert len(two) == 2, "with what difference 100 questions could show, and no correction"
    assert two[0].startswith("gsm8k: b beats a by 50.0 points")
    assert on_models([]) == []

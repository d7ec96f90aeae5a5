"""Which pairs are compared, and what of them is told."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.evals.stats import holm, mcnemar
from flashrl_cli.evals.verdicts import Comparison, Entry, compare
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


def test_one_step_alone_has_nothing_to_be_compared_with() -> None:
    assert compare(steps(20)) == []


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
    other = entry("b", 5, single(2, 2), "math500")
    with pytest.raises(InputError, match="cannot be compared"):
        compare([ours], other)


def test_a_missing_answer_is_refused() -> None:
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

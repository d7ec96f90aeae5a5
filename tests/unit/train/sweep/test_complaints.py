"""A mistake is told once, with what it goes with."""

from __future__ import annotations

import pytest

from flashrl_cli.errors import InputError, Problem, RunFailed
from flashrl_cli.train.sweep import Complaints
from flashrl_cli.train.sweep_axes import Point

POINTS = [Point((("rollout", rollout), ("algorithm.lr", lr))) for rollout in ("int8", "bf16") for lr in ("1", "2", "3")]


def told(*noted: tuple[int, Problem]) -> list[Problem]:
    wrong = Complaints(POINTS)
    for number, problem in noted:
        wrong.note(POINTS[number], problem)
    return wrong.problems()


def test_what_is_wrong_everywhere_is_told_as_it_is() -> None:
    problem = Problem("unknown key a", "--set a", "did you mean b?")
    assert told(*((number, problem) for number in range(6))) == [problem]


def test_what_goes_with_one_value_names_it() -> None:
    bad = Problem("should be less", "p.yaml:3")
    assert told(*((n, bad) for n in (0, 1, 2))) == [Problem("should be less (with rollout=int8)", "p.yaml:3")]
    own = Problem("should be less", "--set algorithm.lr", "--set algorithm.lr=0")
    assert told((1, own), (4, own)) == [Problem("should be less", "--sweep algorithm.lr=2", "--sweep algorithm.lr=0")]


def test_flags_are_told_as_what_was_typed() -> None:
    bad = Problem("no precision", "--rollout", "did you mean --rollout fp8?")
    assert told(*((n, bad) for n in range(6))) == [
        Problem("no precision", "--sweep rollout", "did you mean --sweep rollout=fp8?")
    ]


def test_what_goes_with_no_value_names_points() -> None:
    bad = Problem("no", None)
    assert told((0, bad), (4, bad))[0].message == "no (at rollout=int8 algorithm.lr=1; rollout=bf16 algorithm.lr=2)"
    assert told(*((n, bad) for n in (0, 1, 3, 4, 5)))[0].message.endswith("algorithm.lr=1 and 2 more)")


def test_what_only_some_can_have_is_told_of_those() -> None:
    wrong = Complaints(POINTS)
    wrong.readable = POINTS[1:]
    for number in (3, 4, 5):
        wrong.note(POINTS[number], Problem("a"))
    for number in range(1, 6):
        wrong.note(POINTS[number], Problem("b"))
    for number in (1, 2):
        wrong.note(POINTS[number], Problem("c"))
    assert [problem.message for problem in wrong.problems()] == ["a (with rollout=bf16)", "b", "c (with rollout=int8)"]


def test_collect() -> None:
    def fail(error: Exception) -> int:
        raise error

    wrong = Complaints(POINTS[:1])
    assert wrong.collect(POINTS[0], lambda: 3) == 3
    assert wrong.collect(POINTS[0], lambda: fail(InputError("bad", hint="mend"))) is None
    assert wrong.collect(POINTS[0], lambda: fail(InputError("x", problems=[Problem("a"), Problem("b")]))) is None
    assert wrong.problems() == [Problem("bad", None, "mend"), Problem("a"), Problem("b")]
    with pytest.raises(RunFailed):
        wrong.collect(POINTS[0], lambda: fail(RunFailed("broke")))

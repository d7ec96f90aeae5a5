"""Options as layers; the mistakes in them: test_resolve.py and tests/unit/cli/test_bad_input.py."""

from __future__ import annotations

import pytest

from flashrl_cli.config.merge import Layer
from flashrl_cli.config.options import option_layers
from flashrl_cli.errors import Problem


def layers(*sets: str, rollout: str | None = None, tis: str | None = None) -> tuple[list[Layer], list[Problem]]:
    problems: list[Problem] = []
    return list(option_layers(rollout, tis, sets, problems)), problems


def test_nothing_given_is_no_layer():
    assert layers() == ([], [])


def test_flags_come_before_sets_in_the_order_given():
    found, problems = layers("b.c=2", "a=1", rollout="int8", tis="1.5")
    assert [(layer.label, layer.data) for layer in found] == [
        ("--rollout", {"rollout": {"precision": "int8"}}),
        ("--tis", {"correction": {"cap": 1.5}}),
        ("--set b.c", {"b": {"c": 2}}),
        ("--set a", {"a": 1}),
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("text", "cap"), [("off", None), ("8", 8), ("2.5", 2.5), ("true", "true"), ("", ""), ("x", "x")]
)
def test_cap(text, cap):
    assert layers(tis=text)[0][0].data == {"correction": {"cap": cap}}


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("a.b=[1, x]", {"a": {"b": [1, "x"]}}),
        (" a.b = 1", {"a": {"b": 1}}),
        ("a={b: {c: 1}}", {"a": {"b": {"c": 1}}}),
        ("a=b=c", {"a": "b=c"}),
        ("a=", {"a": None}),
        ("verl.+x.y=1", {"verl": {"+x.y": 1}}),
        ("env.A=010", {"env": {"A": "010"}}),
        ("env.A=[010]", {"env": {"A": ["010"]}}),
        ("envy.A=010", {"envy": {"A": 10}}),
    ],
)
def test_assignment(text, data):
    assert layers(text)[0][0].data == data


@pytest.mark.parametrize("text", ["", "a", "=1", ".a=1", "a.=1", "a\u200bb=1", "a=[", "a=*b", "a=None"])
def test_a_bad_one_is_an_empty_layer_that_holds_its_place(text):
    found, problems = layers("x=1", text, "y=2")
    assert [layer.data for layer in found] == [{"x": 1}, {}, {"y": 2}]
    assert [problem.where for problem in problems] == [found[1].label]
    assert found[1].label.isprintable()

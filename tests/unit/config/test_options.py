"""Options as layers; the mistakes in them: test_resolve.py and tests/unit/cli/test_bad_input.py."""

from __future__ import annotations

import pytest

from flashrl_cli.config.layers import Layer, nested
from flashrl_cli.config.resolve import Options, option_layers
from flashrl_cli.errors import Problem


def layers(*sets: str, rollout: str | None = None, tis: str | None = None) -> tuple[list[Layer], list[Problem]]:
    problems: list[Problem] = []
    return list(option_layers(Options(rollout=rollout, tis=tis, sets=sets), problems)), problems


def test_nothing_given_is_no_layer():
    assert layers() == ([], [])


def test_flags_come_before_sets_in_the_order_given():
    found, problems = layers("b.c=2", "a=1", rollout="int8", tis="1.5")
    assert [(str(layer.origin), layer.data) for layer in found] == [
        ("--rollout", {"rollout": {"precision": "int8"}}),
        ("--tis", {"correction": {"kind": "tis", "cap": 1.5}}),
        ("--set b.c", {"b": {"c": 2}}),
        ("--set a", {"a": 1}),
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("text", "kind", "cap"),
    [
        ("off", "none", None),
        ("8", "tis", 8),
        ("2.5", "tis", 2.5),
        ("true", None, "true"),
        ("", None, ""),
        ("x", None, "x"),
    ],
)
def test_cap(text, kind, cap):
    weights = {"kind": kind, "cap": cap} if kind else {"cap": cap}
    assert layers(tis=text)[0][0].data == {"correction": weights}


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
        ("env.A=[010]", {"env": {"A": "[010]"}}),
        ("env.A=", {"env": {"A": ""}}),
        ("env={A: 010}", {"env": {"A": 10}}),
        ("envy.A=010", {"envy": {"A": 10}}),
    ],
)
def test_assignment(text, data):
    assert layers(text)[0][0].data == data


@pytest.mark.parametrize("text", ["", "a", "=1", ".a=1", "a.=1", "a\u200bb=1", "a=[", "a=*b", "a=None"])
def test_a_bad_one_is_an_empty_layer_that_holds_its_place(text):
    found, problems = layers("x=1", text, "y=2")
    assert [layer.data for layer in found] == [{"x": 1}, {}, {"y": 2}]
    assert [problem.where for problem in problems] == [found[1].origin.where]
    assert str(found[1].origin).isprintable()


KEPT = [
    *(
        "try #3",
        "#3",
        "#",
        "é #x",
        "a # b: c",
        "x#y",
        "https://x/#y",
        "--- x",
        "|",
        ">",
        "a\nb",
        "a\u2028b",
        "it's",
        "| #x\n a",
    ),
    *("yes", "no", "on", "off", "a=b", "=", "a:b", "-x", "naïve"),
]
"""Texts of which a file would drop or change a part (comment, marker, empty block, line break), and similar ones."""
REFUSED = [
    *('"a" #b', "'a' #b", "[1] #b", "{a: 1} #b", "a: b #c", "[1, #x\n 2]", '"a\nb"', "...", "%x"),
    *("@x", "`x", "!tag x", "&anchor x", "*alias", "- a #b", '"a', "\0", "\x1b[0m", ","),
]
"""Values that YAML gives another meaning, or no meaning at all: refused with the way to quote them."""


@pytest.mark.parametrize("text", KEPT)
@pytest.mark.parametrize("key", ["env.NOTE", "description", "verl.data.seed"])
def test_nothing_of_a_text_is_dropped(key, text):
    (layer,), problems = layers(f"{key}= {text} ")
    assert (layer.data, problems) == (nested(key, text), [])


@pytest.mark.parametrize("text", REFUSED)
def test_what_would_lose_a_part_is_refused_with_the_way_to_quote_it(text):
    (layer,), (problem,) = layers(f"description={text}")
    assert layer.data == {}
    assert "if that text is meant: --set" in str(problem.hint)


@pytest.mark.parametrize(
    "text",
    [
        *KEPT,
        *(text for text in REFUSED if text.isprintable() or "\n" in text),
        *("{}", "[]", '{"a": 1}', "a: b", "- x", "null", "~", "007", "0x10", "1e-6", "true", "? x"),
    ],
)
def test_a_variable_is_a_text_whatever_it_looks_like(text):
    (layer,), problems = layers(f"env.NOTE={text}")
    assert (layer.data, problems) == ({"env": {"NOTE": text}}, [])


@pytest.mark.parametrize(
    ("text", "value"),
    [('"x"', "x"), ("'x'", "x"), ('" x "', " x "), ('"try #3"', "try #3"), ("''", ""), ('"a\\nb"', "a\nb")],
)
def test_quotes_around_all_of_a_value_are_not_part_of_it(text, value):
    for key in ("env.NOTE", "description"):
        assert layers(f"{key}={text}")[0][0].data == nested(key, value)


def test_a_point_of_a_sweep_comes_last_under_the_sweeps_names():
    problems: list[Problem] = []
    point = [("rollout", '"int8"'), ("tis", "2"), ("rollout.n", "4"), ("a..b", "1")]
    found = list(option_layers(Options(sets=["x=1"], point=point), problems))
    assert [(str(layer.origin), layer.data) for layer in found] == [
        ("--set x", {"x": 1}),
        ("--sweep rollout", {"rollout": {"precision": "int8"}}),
        ("--sweep tis", {"correction": {"kind": "tis", "cap": 2}}),
        ("--sweep rollout.n", {"rollout": {"n": 4}}),
        ("--sweep a..b", {}),
    ]
    assert [str(problem.where) for problem in problems] == ["--sweep a..b"]


@pytest.mark.parametrize("text", ["8 #x", "#8", "--- 8", "&x 8"])
def test_a_cap_is_a_number_and_nothing_else(text):
    assert layers(tis=text)[0][0].data in ({"correction": {"cap": text}}, {"correction": {"cap": None}})


def test_bytes_that_are_no_text_name_the_shells_encoding():
    for key in ("env.NOTE", "description"):
        _, (problem,) = layers(f"{key}=\udcc3\udca9")
        assert (problem.message.isascii(), problem.hint) == (True, "export LC_ALL=C.UTF-8")

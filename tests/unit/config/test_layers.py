"""Laws of merging, origins that follow the values, and what differs between two configurations."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.config.layers import DEFAULT, Layer, Origin, Verbatim, differences, leaves, merge, nested, option
from flashrl_cli.errors import Location

NAMES = st.sampled_from("abc")
TREES = st.recursive(
    st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=2) | st.none(),
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3),
    max_leaves=6,
)
MAPS = st.dictionaries(NAMES, TREES, max_size=3)


def layer(data: dict[str, Any], label: str = "x") -> Layer:
    return Layer(Origin("preset", Location(label)), data)


def merged(*maps: dict[str, Any]) -> dict[str, Any]:
    return merge([layer(data) for data in maps])[0]


@given(MAPS)
def test_identity_and_idempotence(data):
    assert merged(data) == merged({}, data) == merged(data, {}) == merged(data, data) == data


@given(MAPS, MAPS)
def test_the_last_layer_keeps_its_leaves(first, last):
    result = dict(leaves(merged(first, last)))
    assert all(result[key] == value for key, value in leaves(last))


@given(MAPS, MAPS)
def test_every_leaf_has_the_origin_of_its_value(first, last):
    data, origins = merge([layer(first, "first"), layer(last, "last")])
    assert set(origins) == {key for key, _ in leaves(data)}
    sources = {"first": dict(leaves(first)), "last": dict(leaves(last))}
    for key, value in leaves(data):
        assert sources[str(origins[key])][key] == value


def test_inputs_stay_as_they_are():
    first = {"a": {"b": 1}}
    merged(first, {"a": {"c": 2}})
    assert first == {"a": {"b": 1}}


def test_lists_replace():
    assert merged({"a": [1, 2]}, {"a": [3]}) == {"a": [3]}


def test_a_value_over_a_map_and_a_map_over_a_value():
    data, origins = merge([layer({"a": {"b": 1, "c": 2}, "d": 3}, "x"), layer({"a": None, "d": {"e": 4}}, "y")])
    assert data == {"a": None, "d": {"e": 4}}
    assert origins == {"a": Origin("preset", Location("y")), "d.e": Origin("preset", Location("y"))}


def test_origins_carry_lines_and_read_well():
    file = Location("p.yaml")
    assert merge([Layer(Origin("preset", file), {"a": 1, "b": 2}, lines={"a": 7})])[1] == {
        "a": Origin("preset", Location("p.yaml", 7)),
        "b": Origin("preset", file),
    }
    origins = (
        *(DEFAULT, Origin("derived", reason="why"), Origin("set", Location("--set", key="a"))),
        *(Origin("option", Location("--tis")), Origin("preset", Location("p.yaml", 7))),
    )
    assert [str(origin) for origin in origins] == ["default", "derived: why", "--set a", "--tis", "p.yaml:7"]


@pytest.mark.parametrize(
    ("key", "value", "where", "option_text"),
    [
        ("rollout.n", 8, None, "--set rollout.n=8"),
        ("rollout.n", 8, Location("p.yaml", 3), "--set rollout.n=8"),
        ("rollout.n", 8, Location("--sweep", key="rollout.n"), "--sweep rollout.n=8"),
        ("rollout.precision", "fp8", Location("--rollout"), "--rollout fp8"),
        ("rollout.precision", "fp8", Location("--sweep", key="rollout"), "--sweep rollout=fp8"),
        ("correction.kind", "tis", None, "--set correction.kind=tis"),
        ("correction.kind", "tis", Location("--tis"), "--tis 2"),
        ("correction.kind", "tis", Location("--sweep", key="tis"), "--sweep tis=2"),
        ("trainer.logger", ["file"], None, "--set 'trainer.logger=[file]'"),
    ],
)
def test_the_option_that_gives_a_key_another_value(key, value, where, option_text):
    assert option(key, value, where) == option_text


def test_nested_keeps_names_of_verl_and_env_whole():
    assert nested("data.train", 1) == {"data": {"train": 1}}
    assert nested("verl.a.b.c", 1) == {"verl": {"a.b.c": 1}}
    assert nested("env.X", "1") == {"env": {"X": "1"}}
    assert nested("name", 1) == {"name": 1}


def test_changed_missing_and_new_keys_in_order():
    found = list(differences({"x": 1, "same": 0, "gone": None}, {"new": "a", "same": 0, "x": 2}, {"x": "--set x"}))
    assert [(one.key, *one.shown(), one.origin) for one in found] == [
        ("x", "1", "2", "--set x"),
        ("gone", "null", "–", ""),
        ("new", "–", "a", ""),
    ]
    assert [one.data() for one in found] == [
        {"key": "x", "a": 1, "b": 2, "origin": "--set x"},
        {"key": "gone", "a": None, "origin": ""},
        {"key": "new", "b": "a", "origin": ""},
    ]


def test_equal_values_of_another_type_differ():
    a = {"int": 1, "float": 1.0, "bool": True, "text": "1", "list": (1, 2)}
    b = {"int": 1.0, "float": 1.0, "bool": 1, "text": 1, "list": [1, 2]}
    assert [one.key for one in differences(a, b)] == ["int", "bool", "text"]


def test_text_of_another_language_is_shown_as_it_is():
    (found,) = differences({"x": Verbatim("[1,'2']")}, {"x": Verbatim("True")})
    assert found.shown() == ("[1,'2']", "True")

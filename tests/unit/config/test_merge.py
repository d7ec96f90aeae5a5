"""Laws of merging, and origins that follow the values."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.config.layers import DEFAULT, Layer, Origin, leaves, merge, nested

NAMES = st.sampled_from("abc")
TREES = st.recursive(
    st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=2) | st.none(),
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3),
    max_leaves=6,
)
MAPS = st.dictionaries(NAMES, TREES, max_size=3)


def layer(data: dict[str, Any], label: str = "x") -> Layer:
    return Layer(kind="preset", label=label, data=data)


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
        assert sources[origins[key].where][key] == value


def test_inputs_stay_as_they_are():
    first = {"a": {"b": 1}}
    merged(first, {"a": {"c": 2}})
    assert first == {"a": {"b": 1}}


def test_lists_replace():
    assert merged({"a": [1, 2]}, {"a": [3]}) == {"a": [3]}


def test_a_value_over_a_map_and_a_map_over_a_value():
    data, origins = merge([layer({"a": {"b": 1, "c": 2}, "d": 3}, "x"), layer({"a": None, "d": {"e": 4}}, "y")])
    assert data == {"a": None, "d": {"e": 4}}
    assert origins == {"a": Origin("preset", "y"), "d.e": Origin("preset", "y")}


def test_origins_carry_lines_and_read_well():
    numbered = Layer(kind="preset", label="p.yaml", data={"a": 1, "b": 2}, lines={"a": 7})
    assert merge([numbered])[1] == {"a": Origin("preset", "p.yaml:7"), "b": Origin("preset", "p.yaml")}
    assert [str(o) for o in (DEFAULT, Origin("derived", "why"), Origin("set", "--set a"))] == [
        "default",
        "derived: why",
        "--set a",
    ]


def test_nested_keeps_names_of_verl_and_env_whole():
    assert nested("data.train", 1) == {"data": {"train": 1}}
    assert nested("verl.a.b.c", 1) == {"verl": {"a.b.c": 1}}
    assert nested("env.X", "1") == {"env": {"X": "1"}}
    assert nested("name", 1) == {"name": 1}

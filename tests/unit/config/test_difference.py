"""What differs between two sets of values."""

from __future__ import annotations

from flashrl_cli.config.layers import Verbatim, differences


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


def test_nothing():
    assert list(differences({}, {})) == []

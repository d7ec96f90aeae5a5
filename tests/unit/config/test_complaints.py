"""Where a key was written, and layers that put values where maps belong; what is told of them: test_resolve.py."""

from __future__ import annotations

import pytest

from flashrl_cli.config import diagnose
from flashrl_cli.config.layers import Layer, Origin
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import Problem

ORIGINS = {"a.b": Origin("preset", "p:1"), "a.c.d": Origin("preset", "p:2"), "ab": Origin("default")}


@pytest.mark.parametrize(
    ("key", "place"), [("a.b", "p:1"), ("a", "p:1"), ("a.c", "p:2"), ("a.b.0.x", "p:1"), ("ab", None), ("z", None)]
)
def test_where(key, place):
    assert diagnose.where(key, ORIGINS) == place


def test_keys_of_sub_parts_are_dotted():
    keys = list(diagnose.keys_of(RunSpec))
    assert {"name", "algorithm.filter_groups.enable", "reward.overlong.buffer_len", "verl"} <= set(keys)
    assert "algorithm.filter_groups" not in keys
    assert len(keys) == len(set(keys))


def shaped(**data: object) -> tuple[object, list[Problem]]:
    problems: list[Problem] = []
    layer = Layer(kind="preset", label="p", data=data, lines={"rollout": 3})
    return diagnose.well_shaped(layer, problems).data, problems


def test_values_where_maps_belong_are_taken_out():
    data, problems = shaped(rollout=[1], critic={"lr": 1}, env=None, algorithm={"filter_groups": 2, "lr": 3})
    assert data == {"critic": {"lr": 1}, "algorithm": {"lr": 3}}
    assert [(p.where, p.message.partition(":")[0]) for p in problems] == [
        ("p:3", "rollout = [1]"),
        ("p", "env = null"),
        ("p", "algorithm.filter_groups = 2"),
    ]


def test_what_is_no_part_or_may_be_null_stays():
    data = {"name": "x", "unknown": 1, "reward": {"overlong": None}, "verl": {"a": 1}, "trainer": {"logger": ["file"]}}
    assert shaped(**data) == (data, [])
    assert len(shaped(reward={"overlong": 3})[1]) == 1

"""Where a key was written, and layers that put values where maps belong; what is told of them: test_resolve.py."""

from __future__ import annotations

import pytest

from flashrl_cli.config import diagnose
from flashrl_cli.config.layers import Layer, Origin
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import Location, Problem

ORIGINS = {
    "a.b": Origin("preset", Location("p", 1)),
    "a.c.d": Origin("preset", Location("p", 2)),
    "ab": Origin("default"),
}


@pytest.mark.parametrize(("key", "line"), [("a.b", 1), ("a", 1), ("a.c", 2), ("a.b.0.x", 1), ("ab", None), ("z", None)])
def test_where(key, line):
    assert diagnose.origin_of(key, ORIGINS).where == (line and Location("p", line))


def test_keys_of_sub_parts_are_dotted():
    keys = list(diagnose.keys_of(RunSpec))
    assert {"name", "algorithm.filter_groups.enable", "reward.overlong.buffer_len", "verl"} <= set(keys)
    assert "algorithm.filter_groups" not in keys
    assert len(keys) == len(set(keys))


def shaped(**data: object) -> tuple[object, list[Problem]]:
    problems: list[Problem] = []
    layer = Layer(Origin("preset", Location("p")), data, {"rollout": 3})
    return diagnose.well_shaped(layer, problems).data, problems


def test_values_where_maps_belong_are_taken_out():
    data, problems = shaped(rollout=[1], critic={"lr": 1}, env=None, algorithm={"filter_groups": 2, "lr": 3})
    assert data == {"critic": {"lr": 1}, "algorithm": {"lr": 3}}
    assert [(str(p.where), p.message.partition(":")[0]) for p in problems] == [
        ("p:3", "rollout = [1]"),
        ("p", "env = null"),
        ("p", "algorithm.filter_groups = 2"),
    ]


def test_what_is_no_part_or_may_be_null_stays():
    data = {"name": "x", "unknown": 1, "reward": {"overlong": None}, "verl": {"a": 1}, "trainer": {"logger": ["file"]}}
    assert shaped(**data) == (data, [])
    assert len(shaped(reward={"overlong": 3})[1]) == 1

"""The table of dead keys against verl's own tree, the spec, and the presets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.config.diagnose import keys_of
from flashrl_cli.config.layers import DEFAULT
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.verl import compose
from flashrl_cli.verl.dead_keys import DEAD_KEYS, IGNORED, REMOVED, dead_key
from flashrl_cli.verl.lint import keys
from flashrl_cli.verl.overrides import Override, Places

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")

PLACES = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))
VERLS = re.compile(r"verl\.(\+?)([\w.]+?)(?:\.\*)?(?![\w.*])")
OURS = re.compile(r"(?<![\w.+])(?!verl\.)[a-z]\w*(?:\.\w+)+")

OFF_PATH = re.compile(
    "megatron|veomni|torchtitan|automodel|sglang|trtllm|fully_async|one_step|separation|main_ppo_v0|ray_trainer"
)


@cache
def tree_keys() -> frozenset[str]:
    def walk(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in node.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    return frozenset(walk(compose.tree([]).container()))


def named(pattern: re.Pattern[str]) -> list[tuple[str, ...]]:
    return sorted({found.groups() or (found[0],) for dead in DEAD_KEYS for found in pattern.finditer(dead.instead)})


def test_ignored_keys_compose():
    assert [dead.key for dead in IGNORED if dead.key not in tree_keys()] == []


def test_removed_keys_do_not():
    assert [dead.key for dead in REMOVED if dead.key in tree_keys()] == []


def test_verls_living_names_exist_and_live():
    names = named(VERLS)
    assert len(names) >= 30
    in_tree = [key for plus, key in names if not plus]
    assert [key for key in in_tree if key not in tree_keys()] == []
    assert [key for key in in_tree if dead_key(key)] == []


def test_living_names_with_a_plus_are_fields_of_verls():
    added = [Override(key, 1, DEFAULT, added=True) for plus, key in named(VERLS) if plus]
    assert len(added) >= 4
    assert [key.key for key in added if key.key in tree_keys()] == []
    assert keys.added_key_problems(added, compose.tree([])) == []


def test_our_living_names_are_fields_of_the_spec():
    names = [name for (name,) in named(OURS)]
    assert len(names) >= 10
    assert set(names) - set(keys_of(RunSpec)) == set()


def test_keys_without_a_reader_still_have_none():
    """By search in verl's source, for `parent.name` or `parent.get("name"`; other engines and trainers aside."""
    root = compose.config_folder().parents[1]
    sources = {str(file.relative_to(root)): file for file in root.rglob("*.py")}
    text = "\n".join(file.read_text(encoding="utf-8") for name, file in sources.items() if not OFF_PATH.search(name))
    dead = [dead.key.split(".")[-2:] for dead in IGNORED if dead.why.startswith("no reader")]
    assert len(dead) >= 10
    found = [key for key in dead if re.search(rf"\b{key[0]}(\.|\.get\(.|\[.){key[1]}\b", text)]
    assert found == []

"""docs/recipes.md against what flashrl emits: its tables name every difference, and nothing else.

scripts/ holds the overrides of FlashRL's two bf16 scripts as their shell expands them, with the cap off; those of the
other precisions differ in the run's name only.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashrl_cli.config.presets import names
from flashrl_cli.verl.overrides import Places, overrides
from tests.specs import decided_spec

GOLDEN = Path(__file__).parent
PAGE = (GOLDEN.parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
SCRIPTS = {
    "gsm8k-0.5b": ("GSM8K: what differs", "gsm8k_qwen0_5b_bf16", 40),
    "dapo-32b": ("DAPO: what differs", "dapo_qwen32b_bf16", 71),
}
"""Preset: the heading of its table, its script, and how many overrides that has."""

Items = dict[str, str]


def table(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, less its head."""
    section = re.split(r"^#+ ", PAGE.split(f"# {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def spelled(cells: list[str]) -> dict[str, str | None]:
    """Keys in backticks, with their value where one is given."""
    texts = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    return {key: value if equals else None for key, equals, value in (text.partition("=") for text in texts)}


def items(lines: list[str]) -> Items:
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def read(name: str) -> Items:
    return items((GOLDEN / name).read_text(encoding="utf-8").splitlines())


def ours(preset: str, rollout: str = "bf16", tis: str = "off") -> Items:
    places = Places(name="run", data=Path("/data"), checkpoints=Path("/checkpoints/run"))
    return items([str(override) for override in overrides(decided_spec(preset, rollout=rollout, tis=tis), places)])


def same(text: str, other: str | None) -> bool:
    """Whether two values are the same to verl: 0.80 is 0.8, and 0 is 0.0."""
    try:
        return other is not None and float(text) == float(other)
    except ValueError:
        return text == other


def assert_told(told: dict[str, str | None], different: Items) -> None:
    assert told.keys() == different.keys()
    wrong = {key: value for key, value in told.items() if value is not None and value != different[key]}
    assert not wrong


@pytest.mark.parametrize("preset", SCRIPTS)
def test_tables_tell_every_difference_from_the_script(preset: str) -> None:
    heading, script, count = SCRIPTS[preset]
    theirs, emitted, rows = read(f"scripts/{script}.txt"), ours(preset), table(heading)
    assert len(theirs) == count
    assert all(len(row) == 3 and row[2] for row in rows)
    changed = {key: value for key, value in theirs.items() if not same(value, emitted.get(key))}
    new = {key: value for key, value in emitted.items() if not same(value, theirs.get(key))}
    assert_told(spelled([row[0] for row in rows]), changed)
    assert_told(spelled([row[1] for row in rows]), new)


@pytest.mark.parametrize("preset", SCRIPTS)
def test_precision_and_correction_add_what_the_page_says(preset: str) -> None:
    told = {option.strip("`"): spelled([cell]) for option, _, cell in table("Precision and correction")}
    plain = ours(preset)
    for option, rollout, tis in (
        ("--rollout bf16", "bf16", "off"),
        ("--rollout fp8", "fp8", "off"),
        ("--rollout fp8-block", "fp8-block", "off"),
        ("--rollout int8", "int8", "off"),
        ("--tis 8", "bf16", "8"),
    ):
        added = {k: v for k, v in ours(preset, rollout, tis).items() if plain.get(k) != v}
        assert_told(told.pop(option), added)
    assert_told(told.pop("--tis off"), {k: v for k, v in plain.items() if "rollout_correction" in k})
    assert not told


def test_evaluation_explains_every_key_of_its_lists() -> None:
    lists = read("original/eval.generation.txt") | read("original/eval.score.txt")
    assert len(lists) == 17 + 5 - 1  # both have data.prompt_key
    assert_told(spelled([row[0] for row in table("Evaluation")]), lists)


def test_commands_for_all_scripts_are_there() -> None:
    commands = {row[1].strip("`") for row in table("FlashRL's scripts")}
    assert commands == {
        f"flashrl train --preset {preset}{rollout}{tis}"
        for preset, cap in (("gsm8k-0.5b", 2), ("dapo-32b", 8))
        for rollout in ("", " --rollout int8", " --rollout fp8")
        for tis in ("", f" --tis {cap}")
    }


def test_every_other_preset_has_its_source() -> None:
    told = {key for row in table("The other presets") for key in spelled(row[:1])}
    assert told == set(names()) - SCRIPTS.keys()

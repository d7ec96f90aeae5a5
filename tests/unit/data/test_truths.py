"""Truths, scored as right answers by verl's own scorers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.data import truths
from flashrl_cli.data.truths import plain_number, unpaid
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.verl import rewards

pytestmark = pytest.mark.filterwarnings("ignore")
LIGHT = [scorer for scorer in rewards.SCORERS if scorer.light]


@given(st.decimals(-(10**9), 10**9, places=3), st.sampled_from(["{}", "+{}", "00{}", "{}0", " {} "]))
def test_a_plain_number_is_the_number(value: Any, dress: str) -> None:
    text = f"{value if dress[0] in '{ ' else abs(value):f}"
    found = plain_number(dress.format(text))
    assert found is not None
    assert float(found) == float(text)
    assert plain_number(found) == found, "it is a fixed point"
    assert unpaid([("openai/gsm8k", found), ("math_dapo", found)]) == {}


def test_equal_texts_of_other_types_are_judged_apart() -> None:
    assert list(unpaid([("openai/gsm8k", 5), ("openai/gsm8k", "5"), ("openai/gsm8k", 5)])) == [0, 2]


def test_sources_that_have_no_scorer_or_no_right_answer_are_passed_over() -> None:
    assert unpaid([("my/own", "x"), ("apps", "{}")]) == {}


@pytest.mark.parametrize("scorer", LIGHT, ids=lambda scorer: scorer.module)
@pytest.mark.parametrize(
    "piece", ["$", "\\boxed{", "{", "}", "a ", "\\frac", "\\sqrt", "<answer>", "#### ", "Answer:", "1"]
)
def test_no_truth_keeps_a_light_scorer_busy(scorer: rewards.Scorer, piece: str) -> None:
    """They work in this process, on bounded texts: the longest that are let through, of what their patterns look for,
    end soon.
    """
    source = min(scorer.sources)
    text = (piece * scorer.reads)[: scorer.reads - len(scorer.answer or "") - 20]
    for one in (text, text[:-1] + "x", "x" + text):
        unpaid([(source, {"target": [one]} if scorer is rewards.SEARCH else one)])


def test_a_truth_that_is_too_long_is_not_scored_at_all() -> None:
    [why] = unpaid([("lighteval/MATH", "1" * 10_001)]).values()
    assert why == "is longer than the 10,000 characters that the scorer reads"


def test_without_verl_nothing_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards._light.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentNotReady, match="verl is not installed") as caught:
        unpaid([("openai/gsm8k", "1")])
    assert caught.value.hint == "pip install --no-deps verl==0.9.1"
    with pytest.raises(EnvironmentNotReady, match="verl is not installed"):
        unpaid([("numina_olympiads", "1")])


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A verl of a few lines, whose `prime_math` pays for numbers, hangs, dies and raises; each import is noted."""
    package = tmp_path / "verl/utils/reward_score"
    package.mkdir(parents=True)
    for folder in (tmp_path / "verl", tmp_path / "verl/utils"):
        (folder / "__init__.py").write_text("")
    (package / "__init__.py").write_text(
        "import os, time\n"
        f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\n"
        "def default_compute_score(source, answer, truth):\n"
        "    print('talk')\n"
        "    if truth == 'hang':\n        time.sleep(60)\n"
        "    if truth == 'die':\n        os._exit(3)\n"
        "    return (truth.isdigit(), True, answer)[0]\n"
    )
    (package / "prime_math.py").write_text("")
    (package / "geo3k.py").write_text("import mathruler_that_is_not_there\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(rewards, "require_verl", lambda: tmp_path / "verl")
    return tmp_path


@pytest.mark.processes
def test_heavy_scorers_work_in_a_process_that_a_truth_may_take_along(
    scorers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truths, "LIMIT_S", 0.5)
    monkeypatch.setattr(truths, "_CHUNK", 4)
    values = ["1", "hang", "2", "x", "3", "die", "4", 5, "1", "6"]
    found = unpaid([("numina_olympiads", value) for value in values])
    assert {values[number]: why.partition(",")[0] for number, why in found.items()} == {
        "hang": "keeps verl's scorer busy for more than 0.5 s",
        "x": "written as a right answer",
        "die": "keeps verl's scorer busy for more than 0.5 s",
        5: "makes verl's scorer fail: AttributeError",
    }
    assert len((scorers / "imports").read_text()) == 5, "four chunks or truths ended a process each"


@pytest.mark.processes
def test_a_scorer_without_its_library_is_the_environment(scorers: Path) -> None:
    with pytest.raises(EnvironmentNotReady, match="cannot be scored: No module named 'mathruler_that_is_not_there'"):
        unpaid([("hiyouga/geometry3k", "5")])


@pytest.mark.processes
def test_after_some_that_hang_the_rest_is_given_up(scorers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truths, "_CHUNK", 1)
    monkeypatch.setattr(truths, "_MOST_DEATHS", 1)
    found = unpaid([("numina_olympiads", "die"), ("numina_olympiads", "7")])
    assert found[1] == "was not scored: 1 before it ended the scorer"


def test_no_verl_is_imported() -> None:
    before = set(sys.modules)
    assert unpaid([("openai/gsm8k", "1"), ("math_dapo", "1"), ("lighteval/MATH", "1")]) == {}
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in {"verl", "torch", "ray"}}

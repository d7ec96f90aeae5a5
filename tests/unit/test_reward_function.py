"""A user's reward function: named, loaded, checked and called, with each fault at its line of the user's file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import reward_function
from flashrl_cli.errors import InputError
from flashrl_cli.reward_function import Call, Failed, Failure, Reference, Score

FILE = "/users/reward.py"
DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class A:
    x: int
def score(solution_str): return A(4).x
"""
ALONE = "(of the run's files only this one is there)"
CALL = Call("mydata", "the answer is 5", "5", {"index": 3})


def load(source: str, **arguments: Any) -> reward_function.RewardFunction:
    return reward_function.load(source, FILE, "score", arguments)


def failure(source: str, **arguments: Any) -> Failure:
    """Why a function of this source gives no reward."""
    with pytest.raises(Failed) as caught:
        load(source, **arguments)(CALL)
    return caught.value.failure


@pytest.mark.parametrize(
    ("source", "score"),
    [
        ("def score(solution_str, ground_truth): return ground_truth in solution_str", Score(1.0, {})),
        ("def score(solution_str): return len(solution_str) / 30", Score(0.5, {})),
        ("def score(data_source, solution_str, extra_info=None): return extra_info['index']", Score(3, {})),
        ("def score(*, solution_str, **rest): return len(rest)", Score(3.0, {})),
        ("def score(solution_str): return {'score': -1, 'acc': False}", Score(-1.0, {"acc": False})),
        ("async def score(solution_str): return 0.25", Score(0.25, {})),
        ("import functools\nscore = functools.partial(lambda k, solution_str: k, 2)", Score(2.0, {})),
        ("class Scorer:\n def __call__(self, solution_str): return 0.5\nscore = Scorer()", Score(0.5, {})),
        (DATACLASS, Score(4.0, {})),
    ],
)  # fmt: skip
def test_gives_the_reward_of_a_response(source: str, score: Score) -> None:
    assert load(source)(CALL) == score


def test_gets_the_arguments_of_the_preset_by_name() -> None:
    assert (
        load("def score(solution_str, weight, bonus=0): return weight + bonus", weight=2, bonus=0.5)(CALL).score == 2.5
    )


def test_a_coroutine_function_can_be_awaited() -> None:
    function = load("async def score(solution_str): return {'score': 1, 'judge': 'yes'}")
    assert function.is_async
    assert asyncio.run(function.scored(CALL)) == Score(1.0, {"judge": "yes"})


@pytest.mark.parametrize(
    ("source", "what", "line"),
    [
        ("def score(solution_str):\n return 'yes'", "returns text, 'yes', not a number", 1),
        ("def score(solution_str):\n pass", "returns None, not a number: is a `return` missing?", 1),
        ("\ndef score(solution_str):\n return float('nan')", "returns nan, not a finite number", 2),
        ("def score(solution_str):\n return [1.0]", "returns list [1.0], not one number", 1),
        ("def score(solution_str):\n return {'acc': 1}", "returns a dict without 'score' (it has: acc)", 1),
        ("def score(solution_str):\n return {'score': None}",
         "returns a dict whose 'score' is None, not a number: is a `return` missing?", 1),
        ("def score(solution_str):\n return int(solution_str)",
         "raises ValueError: invalid literal for int() with base 10: 'the answer is 5'", 2),
        ("import sys\ndef score(solution_str):\n sys.exit()", "raises SystemExit", 3),
        ("import not_there", f"raises ModuleNotFoundError: No module named 'not_there' {ALONE}", 1),
        ("score = 3", "score is int 3, not a function", None),
        ("class score: pass", "score is a class, not a function", None),
        ("def other(): pass", "there is no function score in it", None),
        ("def score(:\n pass", "is not Python: invalid syntax", 1),
    ],
)  # fmt: skip
def test_says_why_there_is_no_reward(source: str, what: str, line: int | None) -> None:
    found = failure(source)
    assert (found.what, found.line) == (what, line)


@pytest.mark.parametrize(
    ("signature", "arguments", "what"),
    [
        (
            "response, truth",
            {},
            "demands response (is it solution_str?), truth (is it ground_truth?), which neither",
        ),
        ("prompts, completions, **rest", {}, "scores several responses at once"),
        ("ground_truth", {}, "does not take solution_str"),
        ("solution_str, /", {}, "takes solution_str by position only"),
        ("solution_str", {"weight": 1}, "does not take weight, which reward.arguments gives"),
        ("solution_str", {"ground_truth": 1}, "gets ground_truth from the rows, not from reward.arguments"),
    ],
)
def test_refuses_a_signature_that_cannot_be_called(signature: str, arguments: dict[str, Any], what: str) -> None:
    found = failure(f"def score({signature}): return 1", **arguments)
    assert f"score({signature}) {what}" in found.what
    assert found.line == 1


def test_a_traceback_begins_in_the_users_file() -> None:
    found = failure("import json\ndef score(solution_str):\n    return json.loads(solution_str)")
    assert found.line == 3
    assert found.trace[:3] == (
        "Traceback (most recent call last):",
        f'  File "{FILE}", line 3, in score',
        "    return json.loads(solution_str)",
    )
    assert found.trace[-1].startswith("json.decoder.JSONDecodeError: Expecting value")
    assert not any("reward_function.py" in line for line in found.trace)


def test_a_long_traceback_is_cut_in_its_middle() -> None:
    source = "def score(solution_str, n=0):\n return score(solution_str, n + 1) if n < 90 else 1 / 0"
    found = failure(source.replace("score(solution_str, n + 1)", "one(solution_str, n)") + "\ndef one(s, n):\n return "
                    "score(s, n + 1)")  # fmt: skip
    assert len(found.trace) == reward_function.LONGEST_TRACE + 1
    assert found.trace[-1] == "ZeroDivisionError: division by zero"


def test_a_reference_is_a_file_and_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text("def score(solution_str):\n    return 1\n")
    reference = Reference.parse("reward.py:score")
    assert str(reference) == f"{tmp_path}/reward.py:score"
    assert reference.source().startswith("def score")


@pytest.mark.parametrize("text", ["reward.py", "reward:score", "reward.py:", "reward.py:a.b", "gsm8k", ""])
def test_refuses_what_names_no_function(text: str) -> None:
    with pytest.raises(InputError, match="does not name a reward function") as caught:
        Reference.parse(text, "--reward")
    assert caught.value.problems[0].where == "--reward"


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        (None, "there is no file", "the path of a Python file"),
        ("def scored(solution_str): pass", "there is no function score in it", "did you mean scored?"),
        ("def other(): pass\ndef _hidden(): pass", "there is no function score in it", "has: other"),
        ("x = 1\ndef score(:", "is not Python: invalid syntax", "correct it there"),
    ],
)
def test_says_before_it_is_executed_that_a_file_defines_no_such_function(
    source: str | None, message: str, hint: str, tmp_path: Path
) -> None:
    file = tmp_path / "reward.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(InputError) as caught:
        Reference(file, "score").source()
    (problem,) = caught.value.problems
    assert message in problem.message
    assert hint in (problem.hint or "")


@pytest.mark.parametrize(
    "source", ["score = len", "from x import y as score", "from x import *", "class score: pass", "a, score = 1, 2"]
)
def test_takes_any_definition_of_the_name(source: str, tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text(source)
    assert Reference(file, "score").source() == source

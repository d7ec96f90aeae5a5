"""The data sources that flashrl believes verl can score, and prepared rows, against verl's own reward dispatch."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data.recipes import RECIPES
from flashrl_cli.verl import rewards

pytestmark = pytest.mark.filterwarnings("ignore")


def dispatch() -> ast.FunctionDef:
    """Syntax tree of verl's default_compute_score, without importing verl."""
    spec = importlib.util.find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "utils/reward_score/__init__.py"
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return next(node for node in functions if node.name == "default_compute_score")


def score(data_source: str, response: str, truth: str) -> Any:
    from verl.utils.reward_score import default_compute_score

    return default_compute_score(data_source, response, truth)


def texts(nodes: list[ast.expr]) -> set[str]:
    found = [node for top in nodes for node in ast.walk(top) if isinstance(node, ast.Constant)]
    return {node.value for node in found if isinstance(node.value, str)}


def test_the_names_are_those_that_verl_compares_with() -> None:
    compared = [right for node in ast.walk(dispatch()) if isinstance(node, ast.Compare) for right in node.comparators]
    assert texts(compared) == rewards.NAMES


def test_the_prefixes_are_those_that_verl_asks_for() -> None:
    calls = [node for node in ast.walk(dispatch()) if isinstance(node, ast.Call)]
    asked = [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == "startswith"]
    assert texts([argument for node in asked for argument in node.args]) == set(rewards.PREFIXES)


@pytest.mark.parametrize("name", [*sorted(rewards.NAMES), *(f"{prefix}_2031" for prefix in rewards.PREFIXES)])
def test_verl_has_a_reward_for_every_known_name(name: str) -> None:
    assert rewards.is_scored(name)
    try:
        score(name, "x", '{"inputs": ["1"], "outputs": ["1"]}')
    except NotImplementedError:
        pytest.fail(f"verl has no reward for {name}")
    except (ImportError, TypeError, ValueError, KeyError):
        pass  # dispatched to a scorer that wants another library, or another form of truth


@pytest.mark.parametrize("name", ["", "my/set", "gsm8k", "openai/gsm8k2", "xaime"])
def test_verl_has_none_for_an_unknown_name(name: str) -> None:
    assert not rewards.is_scored(name)
    with pytest.raises(NotImplementedError):
        score(name, "x", "1")


@pytest.mark.parametrize(
    ("name", "raw", "right", "wrong"),
    [
        ("gsm8k", {"question": "q", "answer": "#### 1,000"}, "So #### 1000", "So #### 100"),
        ("arith", {"a": 47, "b": 25}, "12 07 #### 72", "12 06 #### 62"),
        ("math", {"problem": "p", "solution": r"\boxed{\frac{1}{2}}"}, r"\boxed{\frac12}", r"\boxed{2}"),
        ("math-500", {"problem": "p", "answer": r"\pi"}, r"\boxed{\pi}", r"\boxed{3}"),
        ("dapo-math-17k", {"problem": "p", "answer": 34}, "Answer: 34", "Answer: 43"),
        ("aime-2024", {"Problem": "p", "Answer": "073"}, "Answer: 73", "Answer: 7"),
        ("aime-2025", {"problem": "p", "answer": "70"}, "Answer: $70$", "Answer: 7"),
    ],
)
def test_prepared_rows_are_graded_right_and_wrong(name: str, raw: dict[str, Any], right: str, wrong: str) -> None:
    row = RECIPES[name].convert(raw, "test", 0)
    graded = [score(row["data_source"], text, row["reward_model"]["ground_truth"]) for text in (right, wrong)]
    assert [result["acc"] if isinstance(result, dict) else bool(result) for result in graded] == [True, False]

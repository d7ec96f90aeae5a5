"""What verl's scorer returns, as right or wrong."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.evals import grade

QUESTION = {"data_source": "s", "ground_truth": "2", "extra_info": {"index": 1}}


def scorer(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[tuple[Any, ...]]:
    """Put a scorer in verl's place that returns `result`, or raises it; returns the list of its calls."""
    calls: list[tuple[Any, ...]] = []

    def default_compute_score(*args: Any) -> Any:
        calls.append(args)
        if isinstance(result, Exception):
            raise result
        return result

    module = types.ModuleType("verl.utils.reward_score")
    module.default_compute_score = default_compute_score  # type: ignore[attr-defined]
    for name in ("verl", "verl.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (1, (1.0, True)),
        (0, (0.0, False)),
        (0.1, (0.1, False)),
        (0.9, (0.9, True)),
        ({"score": -1.0, "acc": False, "pred": "3"}, (-1.0, False)),
        ({"score": 0.2, "acc": True}, (0.2, True)),
        ({"score": 1.0}, (1.0, True)),
    ],
)
def test_score(monkeypatch: pytest.MonkeyPatch, result: Any, expected: tuple[float, bool]) -> None:
    calls = scorer(monkeypatch, result)
    assert grade.score(QUESTION, "#### 2") == expected
    assert calls == [("s", "#### 2", "2", {"index": 1})]


def test_unknown_source_is_refused_before_anything_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scorer(monkeypatch, NotImplementedError())
    with pytest.raises(InputError, match="no scorer for data_source 's'"):
        grade.check_sources([QUESTION, QUESTION])
    assert len(calls) == 1

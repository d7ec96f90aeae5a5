"""Scorers that verl lacks, for data sources that its dispatch does not know.

verl chooses a scorer by a row's data source, in one function that cannot be extended
(verl/utils/reward_score/__init__.py:19 in 0.9.1); a reward function of the user's replaces it for all rows. Here
further data sources are added, so that rows of several data sets can be trained on together.

Tasks of reasoning-gym are scored by its own functions, which need the entry that was generated: its Python literal is
in `extra_info`, because JSON would turn tuples into lists, which two of the functions do not take for equal.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from flashrl_cli import contract
from flashrl_cli.contract import PATCHED, VERL

ENTRY = "entry"
"""Key of `extra_info` with the literal of a generated entry."""
_THOUGHT = "</think>"


def knows(data_source: str) -> bool:
    """Whether a row of `data_source` is scored here."""
    return data_source == contract.EXACT_SOURCE or data_source.startswith(contract.GYM_SOURCE)


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Score of a response, from 0 to 1, and whether it is right (`acc`), as verl's reward managers take them.

    Raises ValueError for a data source that is not scored here, ImportError if reasoning-gym is not installed.
    """
    if data_source == contract.EXACT_SOURCE:
        score = exact(solution_str, ground_truth)
    elif data_source.startswith(contract.GYM_SOURCE):
        task = data_source.removeprefix(contract.GYM_SOURCE)
        score = gym(task, solution_str, ast.literal_eval((extra_info or {})[ENTRY]))
    else:
        raise ValueError(f"no scorer for {data_source!r}")
    return {"score": score, "acc": float(score >= 1)}


def exact(response: str, truth: str) -> float:
    """1 if the response is the truth, letter for letter except for spaces around it and for thoughts before it."""
    return float(response.rpartition(_THOUGHT)[2].strip() == truth.strip())


def gym(task: str, response: str, entry: Mapping[str, Any]) -> float:
    """reasoning-gym's score of the text between the last `<answer>` and `</answer>` of a response.

    Raises ImportError if a library of the task's is missing, without which no response can be scored.
    """
    answer = importlib.import_module("reasoning_gym.utils").extract_answer(response)
    score = _gym_scorer(task)
    try:
        return float(score(answer, entry))
    except ImportError:
        raise
    except Exception:  # noqa: BLE001  (its functions raise anything for answers of another form)
        return 0.0


@functools.cache
def _gym_scorer(task: str) -> Callable[[str | None, Mapping[str, Any]], float]:
    found: Callable[[str | None, Mapping[str, Any]], float]
    found = importlib.import_module("reasoning_gym").get_score_answer_fn(task)
    return found


def apply() -> None:
    """Have verl score the data sources that are scored here as well (idempotent).

    Raises RuntimeError for a verl other than 0.9.1.
    """
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl adds scorers to verl {VERL} only")
    import verl.utils.reward_score as verls

    original = verls.default_compute_score
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def default_compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **settings: Any
    ) -> Any:
        if knows(data_source):
            return compute_score(data_source, solution_str, ground_truth, extra_info)
        return original(data_source, solution_str, ground_truth, extra_info, **settings)

    contract.replace_in_verl(verls, default_compute_score)

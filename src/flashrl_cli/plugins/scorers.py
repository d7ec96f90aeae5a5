"""Scorers that verl lacks, for data sources that its dispatch does not know.

verl chooses a scorer by a row's data source, in one function that cannot be extended
(verl/utils/reward_score/__init__.py:19 in 0.9.1); a reward function of the user's replaces it for all rows. Here
further data sources are added, so that rows of several data sets can be trained on together.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

from flashrl_cli import contract
from flashrl_cli.contract import PATCHED, VERL

_THOUGHT = "</think>"


def knows(data_source: str) -> bool:
    """Whether a row of `data_source` is scored here."""
    return data_source == contract.EXACT_SOURCE


def compute_score(data_source: str, solution_str: str, ground_truth: Any) -> float:
    """Score of a response, from 0 to 1. Raises ValueError for a data source that is not scored here."""
    if data_source == contract.EXACT_SOURCE:
        return exact(solution_str, ground_truth)
    raise ValueError(f"no scorer for {data_source!r}")


def exact(response: str, truth: str) -> float:
    """1 if the response is the truth, letter for letter except for spaces around it and for thoughts before it."""
    return float(response.rpartition(_THOUGHT)[2].strip() == truth.strip())


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
            return compute_score(data_source, solution_str, ground_truth)
        return original(data_source, solution_str, ground_truth, extra_info, **settings)

    contract.replace_in_verl(verls, default_compute_score)

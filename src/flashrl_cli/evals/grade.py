"""Right or wrong, by verl's own scorer, so that evaluation and training reward agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flashrl_cli.errors import InputError

_RIGHT = 0.5
"""A score above it is right: scorers give 0 or 1, or -1 or 1; geo3k gives 0.1 for the form and 0.9 for the answer."""


def score(question: Mapping[str, Any], response: str) -> tuple[float, bool]:
    """Score of `response` and whether it is right (verl/utils/reward_score/__init__.py, default_compute_score)."""
    from verl.utils.reward_score import default_compute_score

    source, truth = question["data_source"], question["ground_truth"]
    result = default_compute_score(source, response, truth, question["extra_info"])
    if not isinstance(result, dict):
        return float(result), float(result) > _RIGHT
    points = float(result["score"])
    return points, bool(result.get("acc", points > _RIGHT))


def check_sources(questions: Iterable[Mapping[str, Any]]) -> None:
    """Raise InputError if verl has no scorer for a data source of `questions`: before an engine starts, not after."""
    for question in {q["data_source"]: q for q in questions}.values():
        try:
            score(question, "")
        except NotImplementedError as error:
            source = question["data_source"]
            raise InputError(
                f"verl has no scorer for data_source {source!r}", hint="see flashrl prepare --help"
            ) from error

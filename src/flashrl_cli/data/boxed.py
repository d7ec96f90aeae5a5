r"""The answer of a worked solution of MATH: the content of its last `\boxed`."""

from __future__ import annotations

BOX = "\\boxed"


def boxed_answer(solution: str) -> str | None:
    r"""Content of the last `\boxed{…}` (or `\boxed …` up to the next dollar sign); None if there is none that closes.

    Gives what verl's `remove_boxed(last_boxed_only_string(solution))` gives, and None where that fails
    (verl/utils/reward_score/math_reward.py:51-93): a ground truth must be cut the way the scorer cuts a response.
    """
    if f"{BOX} " in solution:
        return solution.rpartition(f"{BOX} ")[2].partition("$")[0]
    _, box, rest = solution.rpartition(BOX)
    if not box or not rest.startswith("{"):
        return None
    end = _closing_brace(rest)
    return None if end is None else rest[1:end]


def _closing_brace(text: str) -> int | None:
    """Index of the brace that closes the one at index 0."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return index
    return None

r"""Our \boxed{} against verl's: ground truth must be cut out the way the scorer cuts out a response's answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_cli.data.recipes import boxed_answer

pytestmark = pytest.mark.filterwarnings("ignore")
PIECES = ["\\boxed{", "\\boxed ", "\\boxed", "\\frac", "{", "}", "$", " ", "x", "\\"]


def verls(solution: str) -> str | None:
    """What verl's preprocess script would take; None where it stops with an error (as on a bare \\fbox)."""
    from verl.utils.reward_score.math_reward import last_boxed_only_string, remove_boxed

    try:
        answer: str = remove_boxed(last_boxed_only_string(solution))
    except (AssertionError, TypeError):
        return None
    return answer


@settings(max_examples=500, deadline=None)
@given(solution=st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_solution(solution: str) -> None:
    assert boxed_answer(solution) == verls(solution)


@pytest.mark.parametrize(
    "solution",
    [
        r"Thus $\boxed{\frac{1}{2}}$.",
        r"$\boxed{1}$, no, $\boxed{\text{(B)}\ \sqrt{\frac{a}{b}}}$.",
        r"There are $\boxed 2$ of them.",
        r"\fbox{3}",
        r"\boxed{\left\{1,2\right\}}",
        "none",
    ],
)
def test_known_solutions(solution: str) -> None:
    assert boxed_answer(solution) == verls(solution)

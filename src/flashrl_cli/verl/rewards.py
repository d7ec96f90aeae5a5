"""Which `data_source` values verl's reward dispatch can score: spelled here so that `prepare` need not import verl.

A row with another value passes every check until the first training step, and ends the run there.
"""

from __future__ import annotations

NUMBERS = frozenset({"openai/gsm8k"})
"""Graded by a number alone."""
MATH = frozenset(
    {
        "lighteval/MATH",
        "DigitalLearningGmbH/MATH-lighteval",
        "HuggingFaceH4/MATH-500",
        "math_dapo",
        "math",
        "math_dapo_reasoning",
        "numina_aops_forum",
        "numina_synthetic_math",
        "numina_amc_aime",
        "numina_synthetic_amc",
        "numina_cn_k12",
        "numina_olympiads",
    }
)
"""Graded by a formula, mostly in a box; so is whatever begins with one of PREFIXES."""
NAMES = (
    NUMBERS
    | MATH
    | {
        "codecontests",
        "apps",
        "codeforces",
        "taco",
        "hiyouga/geometry3k",
        "searchR1_nq",
        "searchR1_triviaqa",
        "searchR1_popqa",
        "searchR1_hotpotqa",
        "searchR1_2wikimultihopqa",
        "searchR1_musique",
        "searchR1_bamboogle",
    }
)
PREFIXES = ("aime",)


def is_scored(data_source: str) -> bool:
    """Whether verl 0.9.1 has a reward for `data_source` (verl/utils/reward_score/__init__.py:44-107)."""
    return data_source in NAMES or data_source.startswith(PREFIXES)


def is_number(data_source: str) -> bool:
    """Whether the ground truth of `data_source` is a number."""
    return data_source in NUMBERS


def is_math(data_source: str) -> bool:
    """Whether the ground truth of `data_source` is a formula."""
    return data_source in MATH or data_source.startswith(PREFIXES)

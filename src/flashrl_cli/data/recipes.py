"""How each data set's raw rows become verl rows: pure functions, and where the raw rows are by default.

Prompt wording, ground truth and data_source are those of verl's examples/data_preprocess/{gsm8k,math_dataset}.py and,
for DAPO and AIME, those in BytedTsinghua-SIA/DAPO-Math-17k.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashrl_cli.data import arith
from flashrl_cli.data.boxed import boxed_answer
from flashrl_cli.data.rows import BadRow, Message, Raw, Reward, Row, make_row, text

GSM8K_SUFFIX = 'Let\'s think step by step and output the final answer after "####".'
MATH_SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem."
)
DAPO_SUFFIX = 'Remember to put your answer on its own line after "Answer:".'
GSM8K_ANSWER = re.compile(r"#### (-?[0-9.,]+)")

Convert = Callable[[Raw, str, int], Row]
"""Raw row, split and index within the split's source to a row; raises BadRow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One data set: the splits it writes, how a raw row is converted, and its home on the hub (None: made here).

    `repeats` marks sets whose published files hold every prompt many times over.
    """

    splits: tuple[str, ...]
    convert: Convert
    hub: str | None = None
    config: str | None = None
    repeats: bool = False


def gsm8k(raw: Raw, split: str, index: int) -> Row:
    """GSM8K: the number after `#### `, without thousands separators."""
    question, answer = text(raw, "question"), text(raw, "answer")
    found = GSM8K_ANSWER.search(answer)
    if found is None:
        raise BadRow("'answer' has no final answer after '#### '")
    extra = {"split": split, "index": index, "answer": answer, "question": question}
    return make_row("openai/gsm8k", f"{question} {GSM8K_SUFFIX}", found[1].replace(",", ""), extra)


def math(raw: Raw, split: str, index: int) -> Row:
    r"""MATH: the content of the solution's last `\boxed{}`."""
    problem, answer = text(raw, "problem"), boxed_answer(text(raw, "solution"))
    if not answer:
        raise BadRow("'solution' has no answer in \\boxed{}")
    extra = {"split": split, "index": index}
    return make_row("DigitalLearningGmbH/MATH-lighteval", f"{problem} {MATH_SUFFIX}", answer, extra)


def math_500(raw: Raw, split: str, index: int) -> Row:
    """MATH-500: the answer has a column of its own."""
    extra = {"split": split, "index": index}
    prompt = f"{text(raw, 'problem')} {MATH_SUFFIX}"
    return make_row("HuggingFaceH4/MATH-500", prompt, text(raw, "answer"), extra)


def competition(data_source: str) -> Convert:
    """Converter for DAPO and AIME: verl rows are taken as they are, problems get DAPO's wording."""

    def convert(raw: Raw, split: str, index: int) -> Row:
        if "reward_model" in raw:
            return adopt(raw, split, index)
        prompt = f"{DAPO_PREFIX}\n\n{text(raw, 'problem', 'Problem')}\n\n{DAPO_SUFFIX}"
        return make_row(data_source, prompt, _number(raw), {"split": split, "index": index}, ability="MATH")

    return convert


def _number(raw: Raw) -> str:
    """The answer as digits alone: the scorer compares text, and a response says 73 where some sets say 073 or 73.0."""
    value = raw.get("answer", raw.get("Answer"))
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    answer = text(raw, "answer", "Answer").strip()
    return str(int(answer)) if answer.isdecimal() else answer


def adopt(raw: Raw, split: str, index: int) -> Row:
    """A row that has verl's schema already, checked, with the split it is written to."""
    reward, extra = raw["reward_model"], raw.get("extra_info") or {}
    if not isinstance(reward, dict) or not isinstance(extra, dict):
        raise BadRow("'reward_model' or 'extra_info' is not an object")
    return Row(
        data_source=text(raw, "data_source"),
        prompt=_messages(raw.get("prompt")),
        ability=text(raw, "ability") if raw.get("ability") else "MATH",
        reward_model=Reward(style=text(reward, "style"), ground_truth=text(reward, "ground_truth")),
        extra_info={"index": index, **extra, "split": split},
    )


def _messages(prompt: Any) -> list[Message]:
    if not isinstance(prompt, list) or not prompt or not all(isinstance(turn, dict) for turn in prompt):
        raise BadRow("'prompt' is not a list of messages")
    return [Message(role=text(turn, "role"), content=text(turn, "content")) for turn in prompt]


RECIPES: dict[str, Recipe] = {
    "gsm8k": Recipe(splits=("train", "test"), convert=gsm8k, hub="openai/gsm8k", config="main"),
    "math": Recipe(splits=("train", "test"), convert=math, hub="DigitalLearningGmbH/MATH-lighteval"),
    "math-500": Recipe(splits=("test",), convert=math_500, hub="HuggingFaceH4/MATH-500"),
    "dapo-math-17k": Recipe(
        splits=("train",), convert=competition("math_dapo"), hub="BytedTsinghua-SIA/DAPO-Math-17k", repeats=True
    ),
    "aime-2024": Recipe(
        splits=("test",), convert=competition("aime_2024"), hub="BytedTsinghua-SIA/AIME-2024", repeats=True
    ),
    "aime-2025": Recipe(splits=("test",), convert=competition("aime_2025"), hub="math-ai/aime25"),
    "arith": Recipe(splits=("train", "test"), convert=arith.row),
}
TINY = "tiny"
"""The data set that brings its own policy; `data.tiny` makes both."""
NAMES = (*RECIPES, TINY)

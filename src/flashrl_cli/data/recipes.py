"""How each data set's raw rows are converted to verl rows (pure functions), and the default sources.

Prompt wording, ground truth and data_source are those of verl's examples/data_preprocess/{gsm8k,math_dataset}.py and,
for DAPO and AIME, those in BytedTsinghua-SIA/DAPO-Math-17k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flashrl_cli.data import arith, truths
from flashrl_cli.data.rows import BadRow, Message, Needs, Raw, Reward, Row, Scoring, faults, make_row, printable, text
from flashrl_cli.data.writing import DEEPEST
from flashrl_cli.verl import rewards

GSM8K_SUFFIX = 'Let\'s think step by step and output the final answer after "####".'
MATH_SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem."
)
DAPO_SUFFIX = 'Remember to put your answer on its own line after "Answer:".'
GSM8K_MARK = "#### "
BOX = "\\boxed"
VERL_COLUMNS = ("data_source", "prompt", "ability", "reward_model", "extra_info")
_KEPT_KEYS = {"prompt": ("role", "content"), "reward_model": ("style", "ground_truth")}
_FORMULA = "as a response would write it: 1000 for 1e3, 5 for $5, \\frac{1}{2} for ½"
_NUMBER = "a plain number, such as 72, -5 or 0.25"

Convert = Callable[[Raw, str, int], Row]
"""Converts a raw row, a split and the index within the split's source to a row; raises BadRow."""
_COMPETITION = ("problem", "Problem", "answer", "Answer")
TINY = "tiny"
"""Name of the data set that includes a policy; `data.tiny` creates both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One data set: the splits it writes, how a raw row is converted, and its hub id (None: generated locally).

    `splits` is empty if the source decides. `columns` are the columns of a raw row that are read, None for all of them.
    `repeats` marks sets whose published files contain every prompt many times, `adopts` those whose rows may have
    verl's schema already. `hold_out` is the share of the rows that become the test split if the source has none.
    """

    splits: tuple[str, ...]
    convert: Convert
    columns: tuple[str, ...] | None
    hub: str | None = None
    config: str | None = None
    repeats: bool = False
    adopts: bool = False
    scoring: Scoring = Scoring.VERL
    hold_out: float = 0.0


def gsm8k(raw: Raw, split: str, index: int) -> Row:
    """GSM8K: the truth is the number after `#### `, without thousands separators."""
    question, answer = text(raw, "question"), text(raw, "answer")
    _, mark, final = answer.rpartition(GSM8K_MARK)
    if not mark or not final.strip():
        raise BadRow("'answer' has no final answer after '#### '")
    extra = {"split": split, "index": index, "answer": answer, "question": question}
    return make_row("openai/gsm8k", f"{question} {GSM8K_SUFFIX}", plain("openai/gsm8k", final), extra)


def math(raw: Raw, split: str, index: int) -> Row:
    r"""MATH: the truth is the content of the solution's last `\boxed{}`."""
    problem, answer = text(raw, "problem"), boxed_answer(text(raw, "solution"))
    if not answer or not answer.strip():
        raise BadRow("'solution' has no answer in \\boxed{}")
    extra, source = {"split": split, "index": index}, "DigitalLearningGmbH/MATH-lighteval"
    return make_row(source, f"{problem} {MATH_SUFFIX}", plain(source, answer), extra)


def math_500(raw: Raw, split: str, index: int) -> Row:
    """MATH-500: the truth has a separate column."""
    extra, source = {"split": split, "index": index}, "HuggingFaceH4/MATH-500"
    prompt = f"{text(raw, 'problem')} {MATH_SUFFIX}"
    return make_row(source, prompt, plain(source, text(raw, "answer")), extra)


def boxed_answer(solution: str) -> str | None:
    r"""Content of the last `\boxed{…}` (or `\boxed …` up to the next dollar sign); None if none closes.

    The result equals that of verl's `remove_boxed(last_boxed_only_string(solution))`, and is None where that fails
    (verl/utils/reward_score/math_reward.py:51-93): a ground truth must be extracted in the same way as the scorer
    extracts the answer from a response.
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


def competition(data_source: str) -> Convert:
    """Converter for DAPO and AIME: verl rows are kept unchanged, plain problems get DAPO's prompt wording."""

    def convert(raw: Raw, split: str, index: int) -> Row:
        if "reward_model" in raw:
            return adopt(raw, split, index)
        prompt = f"{DAPO_PREFIX}\n\n{text(raw, 'problem', 'Problem')}\n\n{DAPO_SUFFIX}"
        return make_row(
            data_source, prompt, _number(raw, data_source), {"split": split, "index": index}, ability="MATH"
        )

    return convert


def _number(raw: Raw, source: str) -> str:
    """The answer of a row, which may be a JSON number."""
    value = raw.get("answer", raw.get("Answer"))
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return plain(source, text(raw, "answer", "Answer"))


def plain(source: str, truth: str) -> str:
    """A truth as a response would write it: scorers compare text, and a response has 73 where some sets have 073.

    Formulas of MATH are kept unchanged, as its scorer expects them. BadRow for a number in a form that no response has.
    """
    scorer = rewards.scorer(source)
    number = truths.plain_number(truth) if scorer in {rewards.GSM8K, rewards.DAPO} else None
    if number is not None:
        return number
    if scorer is rewards.GSM8K:
        raise BadRow("the final answer is not a number", fix=_NUMBER, value=truth)
    if rewards.is_math(source) and truths.is_odd_number(truth):
        raise BadRow("the answer is a number in a form that no response has", fix=_FORMULA, value=truth)
    return truth.strip() if scorer is rewards.DAPO else truth


def adopt(raw: Raw, split: str, index: int) -> Row:
    """A row that already has verl's schema, after a check, with the split that it is written to."""
    if fault := next(faults(raw, Needs()), None):
        raise BadRow(fault.message, fix=fault.fix, value=fault.value)
    source, reward, extra = raw["data_source"], raw["reward_model"], raw.get("extra_info") or {}
    truth = reward["ground_truth"]
    return Row(
        data_source=source,
        prompt=[message(turn) for turn in raw["prompt"]],
        ability=text(raw, "ability") if raw.get("ability") else "MATH",
        reward_model=Reward(
            style=text(reward, "style") if reward.get("style") else "rule",
            ground_truth=plain(source, truth) if isinstance(truth, str) else truth,
        ),
        extra_info={"index": index, **without_empty(extra), "split": split},
    )


def message(turn: Raw) -> Message:
    """A message with nothing but role and content; BadRow if it has none."""
    if turn["content"] is None:
        raise BadRow("an assistant message has tool calls and no content", fix="rows of text alone")
    return Message(role=turn["role"], content=turn["content"])


def without_empty(value: Any, depth: int = 0) -> Any:
    """`value` with null for each empty object, which Parquet cannot hold; nesting beyond the limit is refused later."""
    if depth > DEEPEST:
        return value
    if isinstance(value, dict):
        return {key: without_empty(one, depth + 1) for key, one in value.items()} if value or not depth else None
    if isinstance(value, list):
        return [without_empty(one, depth + 1) for one in value]
    return value


def _holds_empty(value: Any, depth: int = 0) -> bool:
    if not isinstance(value, dict | list) or depth > DEEPEST:
        return False
    parts = value.values() if isinstance(value, dict) else value
    return (depth > 0 and value == {}) or any(_holds_empty(one, depth + 1) for one in parts)


def dropped(raw: Raw, recipe: Recipe) -> Iterator[str]:
    """Yield the columns and keys of a raw row that are dropped: all but the recipe's, or but verl's if it adopts it."""
    if recipe.columns is None:
        return
    adopted = recipe.adopts and "reward_model" in raw
    for name, value in raw.items():
        if name not in (VERL_COLUMNS if adopted else recipe.columns) and not _is_nothing(value):
            yield printable(name)
    for name, kept in _KEPT_KEYS.items() if adopted else ():
        held = raw.get(name)
        parts = held if isinstance(held, list) else [held]
        keys = {key for part in parts if isinstance(part, dict) for key in part if not _is_nothing(part[key])}
        yield from sorted(f"{name}.{printable(key)}" for key in keys - set(kept))
    if adopted and _holds_empty(raw.get("extra_info")):
        yield "empty objects in extra_info"


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


RECIPES: dict[str, Recipe] = {
    "gsm8k": Recipe(
        splits=("train", "test"), convert=gsm8k, columns=("question", "answer"), hub="openai/gsm8k", config="main"
    ),
    "math": Recipe(
        splits=("train", "test"),
        convert=math,
        columns=("problem", "solution"),
        hub="DigitalLearningGmbH/MATH-lighteval",
    ),
    "math-500": Recipe(splits=("test",), convert=math_500, columns=("problem", "answer"), hub="HuggingFaceH4/MATH-500"),
    "dapo-math-17k": Recipe(
        splits=("train",),
        convert=competition("math_dapo"),
        columns=_COMPETITION,
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
        repeats=True,
        adopts=True,
    ),
    "aime-2024": Recipe(
        splits=("test",),
        convert=competition("aime_2024"),
        columns=_COMPETITION,
        hub="BytedTsinghua-SIA/AIME-2024",
        repeats=True,
        adopts=True,
    ),
    "aime-2025": Recipe(
        splits=("test",), convert=competition("aime_2025"), columns=_COMPETITION, hub="math-ai/aime25", adopts=True
    ),
    "arith": Recipe(splits=("train", "test"), convert=arith.row, columns=("a", "b")),
}
NAMES = (*RECIPES, TINY)

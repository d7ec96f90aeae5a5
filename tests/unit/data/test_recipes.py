"""Raw rows to verl rows, with the expected row written out in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data.recipes import RECIPES
from flashrl_cli.data.rows import BadRow, Row
from flashrl_cli.verl import rewards

GSM8K_TAIL = 'Let\'s think step by step and output the final answer after "####".'
MATH_TAIL = "Let's think step by step and output the final answer within \\boxed{}."
DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nFind x.\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
DAPO_ROW = {
    "data_source": "math_dapo",
    "prompt": [{"content": DAPO_PROMPT, "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}


def convert(name: str, raw: dict[str, Any], split: str = "test", index: int = 7) -> Row:
    return RECIPES[name].convert(raw, split, index)


def test_gsm8k_first_row_of_train() -> None:
    question = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?"
    )
    answer = (
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
        "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
    )
    assert convert("gsm8k", {"question": question, "answer": answer}, "train", 0) == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "role": "user",
                "content": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
                "May. How many clips did Natalia sell altogether in April and May? Let's think step by step and "
                'output the final answer after "####".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 0, "answer": answer, "question": question},
    }


@pytest.mark.parametrize(
    ("split", "index", "start", "truth"),
    [
        ("test", 0, "Janet’s ducks lay 16 eggs per day.", "18"),
        ("test", 146, "Johnny is picking up the toys on the floor of his room.  He'd", "2125"),
        ("test", 201, "John wins an award at work.  The award", "114200"),
    ],
)
def test_gsm8k_rows_as_published(gsm8k: Path, split: str, index: int, start: str, truth: str) -> None:
    raw = json.loads((gsm8k / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[index])
    row = convert("gsm8k", raw, split, index)
    assert row["prompt"][0]["content"].startswith(start)
    assert row["prompt"][0]["content"] == raw["question"] + " " + GSM8K_TAIL
    assert row["reward_model"]["ground_truth"] == truth
    assert row["extra_info"] == {"split": split, "index": index, "answer": raw["answer"], "question": raw["question"]}


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_row_of_gsm8k(gsm8k: Path, split: str) -> None:
    for index, line in enumerate((gsm8k / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()):
        raw = json.loads(line)
        row = convert("gsm8k", raw, split, index)
        assert row["reward_model"]["ground_truth"] == raw["answer"].split("#### ")[-1].replace(",", "")
        assert row["prompt"][0]["content"] == raw["question"] + " " + GSM8K_TAIL


def test_math() -> None:
    raw = {"problem": "Half of one?", "level": "Level 1", "type": "Algebra", "solution": "$\\boxed{\\frac{1}{2}}$."}
    assert convert("math", raw, "train", 4) == {
        "data_source": "DigitalLearningGmbH/MATH-lighteval",
        "prompt": [{"role": "user", "content": f"Half of one? {MATH_TAIL}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "\\frac{1}{2}"},
        "extra_info": {"split": "train", "index": 4},
    }


def test_math_500_takes_the_answer_from_its_column() -> None:
    row = convert("math-500", {"problem": "p", "solution": "\\boxed{wrong}", "answer": "\\pi"})
    assert (row["data_source"], row["reward_model"]["ground_truth"]) == ("HuggingFaceH4/MATH-500", "\\pi")
    assert row["prompt"] == [{"role": "user", "content": f"p {MATH_TAIL}"}]


def test_a_row_of_dapo_is_taken_as_it_is_but_for_the_split() -> None:
    row = convert("dapo-math-17k", DAPO_ROW, "train", 0)
    assert row == DAPO_ROW | {"extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079", "split": "train"}}


@pytest.mark.parametrize("name", ["aime-2024", "aime-2025"])
@pytest.mark.parametrize(
    "raw",
    [{"problem": "Find x.", "answer": "034"}, {"ID": "2024-I-1", "Problem": "Find x.", "Solution": "", "Answer": 34}],
)
def test_aime_problems_get_the_wording_of_dapo(name: str, raw: dict[str, Any]) -> None:
    assert convert(name, raw) == {
        "data_source": name.replace("-", "_"),
        "prompt": [{"role": "user", "content": DAPO_PROMPT}],
        "ability": "MATH",
        "reward_model": {"style": "rule", "ground_truth": "34"},
        "extra_info": {"split": "test", "index": 7},
    }


@pytest.mark.parametrize(
    ("answer", "truth"), [("073", "73"), (73, "73"), (73.0, "73"), ("0", "0"), (" 5 ", "5"), ("-1/2", "-1/2")]
)
def test_answers_are_written_as_a_response_would(answer: object, truth: str) -> None:
    assert convert("aime-2025", {"problem": "p", "answer": answer})["reward_model"]["ground_truth"] == truth


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "42"}, "no final answer after '#### '"),
        ("gsm8k", {"question": "q"}, "no column 'answer'"),
        ("math", {"problem": "p", "solution": "42"}, "no answer in"),
        ("math", {"problem": "p", "solution": "\\boxed{}"}, "no answer in"),
        ("math-500", {"problem": "p", "answer": ""}, "'answer' is empty"),
        ("aime-2025", {"problem": "p", "answer": True}, "'answer' is bool"),
        ("aime-2025", {"problem": "p", "answer": 0.5}, "'answer' is float"),
        ("aime-2025", {"problem": "p", "answer": float("nan")}, "'answer' is float"),
        ("aime-2024", {"Problem": "p"}, "no column 'answer'"),
        ("dapo-math-17k", DAPO_ROW | {"reward_model": None}, "not an object"),
        ("dapo-math-17k", DAPO_ROW | {"extra_info": "x"}, "not an object"),
        (
            "dapo-math-17k",
            DAPO_ROW | {"reward_model": {"style": "rule", "ground_truth": ""}},
            "'ground_truth' is empty",
        ),
        ("dapo-math-17k", DAPO_ROW | {"prompt": "Find x."}, "not a list of messages"),
        ("dapo-math-17k", DAPO_ROW | {"prompt": []}, "not a list of messages"),
        ("dapo-math-17k", DAPO_ROW | {"prompt": [{"role": "user"}]}, "no column 'content'"),
    ],
)
def test_rows_without_what_training_needs_are_refused(name: str, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        convert(name, raw)


def test_every_data_source_that_is_written_has_a_reward() -> None:
    raw = {"question": "q", "problem": "p", "answer": "#### 1", "solution": "\\boxed{1}", "a": 1, "b": 2}
    assert all(rewards.is_scored(convert(name, raw)["data_source"]) for name in RECIPES)

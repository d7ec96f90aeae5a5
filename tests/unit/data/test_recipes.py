"""Raw rows to verl rows, with the expected row written out in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.data import arith
from flashrl_cli.data.recipes import RECIPES, boxed_answer, dropped
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


NUMBERS = [
    ("73", "73"), ("073", "73"), ("000", "0"), ("-0", "0"), ("+5", "5"), ("-5", "-5"), ("1,234", "1234"),
    ("-1,234,567", "-1234567"), ("12.0", "12"), ("12.", "12"), ("0.50", "0.5"), (".5", "0.5"), (" 7 ", "7"),
]  # fmt: skip
ODD = ["$5", "$1,234", "5%", "5 %", "5€", "1e3", "1E-3", "1_234", "½", "１２", "3½", "٣", "²"]
NO_NUMBERS = ["12abc", "abc 12", "1,23", "1.2.3", "--5", "1 234", "5 dollars", "12\n13", "x", "\ud800", "1/2"]


@pytest.mark.parametrize(("written", "truth"), NUMBERS)
def test_numbers_are_written_in_the_one_form_that_a_response_has(written: str, truth: str) -> None:
    """Also those of rows that are taken as they are, and what the scorer compares is that form, letter by letter."""
    adopted = DAPO_ROW | {"reward_model": {"style": "rule", "ground_truth": written}}
    taken = [
        convert("gsm8k", {"question": "q", "answer": f"So.\n#### {written}"}),
        convert("aime-2024", {"problem": "p", "answer": written}),
        convert("dapo-math-17k", adopted),
        convert("dapo-math-17k", adopted | {"data_source": "openai/gsm8k"}),
    ]
    assert [row["reward_model"]["ground_truth"] for row in taken] == [truth] * 4


@pytest.mark.parametrize("written", ODD)
def test_numbers_in_a_form_that_no_response_has_are_refused(written: str) -> None:
    adopted = DAPO_ROW | {"reward_model": {"style": "rule", "ground_truth": written}}
    for name, raw in (
        ("gsm8k", {"question": "q", "answer": f"#### {written}"}),
        ("aime-2024", {"problem": "p", "answer": written}),
        ("math-500", {"problem": "p", "answer": written}),
        ("math", {"problem": "p", "solution": rf"\boxed{{{written}}}"}),
        ("dapo-math-17k", adopted),
    ):
        with pytest.raises(BadRow, match=r"not a number|no response has") as caught:
            convert(name, raw)
        assert caught.value.fault.value == repr(written)
        assert caught.value.fault.fix


@pytest.mark.parametrize("written", NO_NUMBERS)
def test_a_final_answer_of_gsm8k_is_a_number_to_its_end(written: str) -> None:
    with pytest.raises(BadRow, match="the final answer is not a number"):
        convert("gsm8k", {"question": "q", "answer": f"1 + 1 = 2\n#### {written}"})


@pytest.mark.parametrize(
    "truth", [r"\frac{1}{2}", r"5\%", r"\$5", "2041_5", "x^2", "(1, 2)", r"1{,}234", "10,000", "90^\\circ", "0.50"]
)
def test_formulas_of_math_are_taken_as_they_are(truth: str) -> None:
    assert convert("math-500", {"problem": "p", "answer": truth})["reward_model"]["ground_truth"] == truth
    solved = {"problem": "p", "solution": rf"So $\boxed{{{truth}}}$."}
    assert convert("math", solved)["reward_model"]["ground_truth"] == truth


def test_the_last_of_several_final_answers_counts() -> None:
    row = convert("gsm8k", {"question": "q", "answer": "#### 1, no:\n#### 2"})
    assert row["reward_model"]["ground_truth"] == "2"


def test_what_is_not_taken_of_a_row_is_named() -> None:
    turn = {"role": "user", "content": "?", "name": "me", "tool_calls": None}
    raw = DAPO_ROW | {"prompt": [turn], "images": [b"png"], "videos": [], "id": 3, "extra_info": {"a": {}, "b": [{}]}}
    raw["reward_model"] = {"style": "rule", "ground_truth": "1", "solution": "s"}
    recipe = RECIPES["dapo-math-17k"]
    assert list(dropped(raw, recipe)) == [
        "images", "id", "prompt.name", "reward_model.solution", "empty objects in extra_info"
    ]  # fmt: skip
    assert recipe.convert(raw, "train", 0)["extra_info"] == {"index": 0, "a": None, "b": [None], "split": "train"}
    assert list(dropped({"problem": "p", "solution": "s", "level": 3, "type": ""}, RECIPES["math"])) == ["level"]
    assert list(dropped(DAPO_ROW, recipe)) == []


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "42"}, "no final answer after '#### '"),
        ("gsm8k", {"question": "q"}, "no column 'answer'"),
        ("math", {"problem": "p", "solution": "42"}, "no answer in"),
        ("math", {"problem": "p", "solution": "\\boxed{}"}, "no answer in"),
        ("math-500", {"problem": "p", "answer": ""}, "'answer' is empty"),
        ("aime-2025", {"problem": "p", "answer": True}, "'answer' is true or false"),
        ("aime-2025", {"problem": "p", "answer": 0.5}, "'answer' is a number"),
        ("aime-2025", {"problem": "p", "answer": float("nan")}, "'answer' is a number"),
        ("aime-2024", {"Problem": "p"}, "no column 'answer'"),
        ("dapo-math-17k", DAPO_ROW | {"reward_model": None}, "not an object"),
        ("dapo-math-17k", DAPO_ROW | {"extra_info": "x"}, "not an object"),
        (
            "dapo-math-17k",
            DAPO_ROW | {"reward_model": {"style": "rule", "ground_truth": ""}},
            "ground_truth is empty",
        ),
        ("dapo-math-17k", DAPO_ROW | {"prompt": "Find x."}, "not a list of messages"),
        ("dapo-math-17k", DAPO_ROW | {"prompt": []}, "no messages"),
        ("dapo-math-17k", DAPO_ROW | {"prompt": [{"role": "user"}]}, "content of the user message is missing"),
    ],
)
def test_rows_without_what_training_needs_are_refused(name: str, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        convert(name, raw)


def test_every_data_source_that_is_written_has_a_reward() -> None:
    raw = {"question": "q", "problem": "p", "answer": "#### 1", "solution": "\\boxed{1}", "a": 1, "b": 2}
    assert all(rewards.is_scored(convert(name, raw)["data_source"]) for name in RECIPES)


plain = st.text(st.characters(exclude_characters="{}\\"), max_size=5)
balanced = st.recursive(plain, lambda inner: st.tuples(plain, inner, plain).map(lambda t: f"{t[0]}{{{t[1]}}}{t[2]}"))
prose = st.text(st.characters(exclude_characters="\\"), max_size=20)


@given(before=prose, answer=balanced, after=prose)
def test_the_content_comes_back_whatever_surrounds_it(before: str, answer: str, after: str) -> None:
    assert boxed_answer(f"{before}\\boxed{{{answer}}}{after}") == answer


@given(first=balanced, last=balanced)
def test_the_last_box_wins(first: str, last: str) -> None:
    assert boxed_answer(f"\\boxed{{{first}}} or rather \\boxed{{{last}}}") == last


@given(answer=balanced)
def test_a_box_that_never_closes_has_no_answer(answer: str) -> None:
    assert boxed_answer(f"\\boxed{{{{{answer}}}") is None


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\text{(A)}\ \sqrt{\frac{a}{b}}}", r"\text{(A)}\ \sqrt{\frac{a}{b}}"),
        (r"$\boxed 2$ pencils", "2"),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed5", None),
        (r"\fbox{3}", None),
        ("", None),
    ],
)
def test_known_solutions(solution: str, answer: str | None) -> None:
    assert boxed_answer(solution) == answer


number = st.integers(0, 99)


@given(a=number, b=number)
def test_a_solution_adds_up_digit_by_digit(a: int, b: int) -> None:
    units, tens, mark, answer = arith.solution(a, b).split()
    assert mark == "####"
    assert int(answer) == a + b == int(units) % 10 + 10 * int(tens)
    assert len(units) == len(tens) == 2


def test_the_wording() -> None:
    assert arith.question(47, 25) == "What is 47 plus 25?"
    assert arith.solution(47, 25) == "12 07 #### 72"
    assert arith.solution(99, 99) == "18 19 #### 198"


@given(seed=st.integers(0, 2**32))
def test_splits_are_disjoint_and_of_their_size(seed: int) -> None:
    pairs = arith.pairs(seed)
    train, test = set(pairs["train"]), set(pairs["test"])
    assert (len(train), len(test)) == (4096, 256)
    assert not train & test
    assert {n for pair in train | test for n in pair} <= set(range(100))


def test_the_seed_decides() -> None:
    assert arith.pairs(1) == arith.pairs(1)
    assert arith.pairs(1) != arith.pairs(2)


def test_a_row_is_graded_as_gsm8k() -> None:
    assert arith.row({"a": 47, "b": 25}, "train", 3) == {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "What is 47 plus 25?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 3, "answer": "12 07 #### 72", "question": "What is 47 plus 25?"},
    }

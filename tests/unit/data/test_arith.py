"""The sums of the embedded default."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.data import recipes

number = st.integers(0, 99)


@given(a=number, b=number)
def test_a_solution_adds_up_digit_by_digit(a: int, b: int) -> None:
    units, tens, mark, answer = recipes.solution(a, b).split()
    assert mark == "####"
    assert int(answer) == a + b == int(units) % 10 + 10 * int(tens)
    assert len(units) == len(tens) == 2


def test_the_wording() -> None:
    assert recipes.question(47, 25) == "What is 47 plus 25?"
    assert recipes.solution(47, 25) == "12 07 #### 72"
    assert recipes.solution(99, 99) == "18 19 #### 198"


@given(seed=st.integers(0, 2**32))
def test_splits_are_disjoint_and_of_their_size(seed: int) -> None:
    pairs = recipes.pairs(seed)
    train, test = set(pairs["train"]), set(pairs["test"])
    assert (len(train), len(test)) == (4096, 256)
    assert not train & test
    assert {n for pair in train | test for n in pair} <= set(range(100))


def test_the_seed_decides() -> None:
    assert recipes.pairs(1) == recipes.pairs(1)
    assert recipes.pairs(1) != recipes.pairs(2)


def test_a_row_is_graded_as_gsm8k() -> None:
    assert recipes.row({"a": 47, "b": 25}, "train", 3) == {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "What is 47 plus 25?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 3, "answer": "12 07 #### 72", "question": "What is 47 plus 25?"},
    }

"""What the demonstrations say, without a model: a tokenizer that takes every character for a token stands in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from flashrl_cli.data import recipes
from flashrl_cli.data.tiny import END, MAX_NEW_TOKENS, Demonstrations


class Characters:
    """Tokens are characters; the end marker is one token."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(message["content"] for message in messages) + "\n"

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) for letter in text.replace(END, "\0")])


@pytest.fixture(scope="module")
def demonstrations() -> Demonstrations:
    return Demonstrations(cast("Any", Characters()), seed=5)


def test_every_answer_fits(demonstrations: Demonstrations) -> None:
    longest = max(len(recipes.solution(a, b)) + 1 for split in demonstrations.pairs.values() for a, b in split)
    assert longest <= MAX_NEW_TOKENS


def test_prompts_ask_what_the_rows_ask(demonstrations: Demonstrations) -> None:
    assert demonstrations.pairs == recipes.pairs(5)
    (a, b) = demonstrations.pairs["test"][0]
    asked = "".join(map(chr, demonstrations.prompts[a, b]))
    prompt = recipes.row({"a": a, "b": b}, "test", 0)["prompt"]
    assert asked == Characters().apply_chat_template(cast("Any", prompt))
    assert demonstrations.width == max(map(len, demonstrations.prompts.values())) + MAX_NEW_TOKENS


def test_clean_answers_are_right_and_half_of_the_careless_ones_are_not(demonstrations: Demonstrations) -> None:
    right = recipes.solution(47, 25) + END
    assert {demonstrations.answer(47, 25, careless=False) for _ in range(50)} == {right}
    careless = [demonstrations.answer(47, 25, careless=True) for _ in range(400)]
    assert 0.4 < sum(answer == right for answer in careless) / 400 < 0.6


def test_demonstrations_are_of_the_training_split(demonstrations: Demonstrations) -> None:
    train = set(demonstrations.pairs["train"])
    assert all(demonstrations.pair() in train for _ in range(200))


def test_same_seed_same_demonstrations() -> None:
    one, same, other = (Demonstrations(cast("Any", Characters()), seed=seed) for seed in (1, 1, 2))
    drawn = [[d.pair() for _ in range(20)] for d in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]

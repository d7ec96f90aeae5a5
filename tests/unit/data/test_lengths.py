"""Prompt lengths in tokens."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.data import prepare
from flashrl_cli.data.rows import make_row
from flashrl_cli.errors import EnvironmentNotReady, InputError


class Words:
    """Tokenizer with a token for each word and two for the template."""

    chat_template = "{{ messages }}"

    def apply_chat_template(self, chats: list[Any], **options: Any) -> list[list[int]]:
        assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return [[0] * (2 + sum(len(turn["content"].split()) for turn in chat)) for chat in chats]


def test_prompts_are_counted_with_their_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "BATCH", 2)
    rows = [make_row("math", prompt, "1", {}) for prompt in ("a", "a b c", "a b")]
    ticks: list[int] = []
    assert prepare.prompt_tokens(Words(), rows, ticks.append) == [3, 5, 4]
    assert ticks == [2, 1]


@given(values=st.lists(st.integers(1, 10_000), min_size=1, max_size=200))
def test_percentiles_are_values_that_enough_stay_below(values: list[int]) -> None:
    summary = prepare.summary(values)
    assert summary["longest"] == max(values)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        assert summary[name] in values
        assert sum(value <= summary[name] for value in values) >= share * len(values)
        assert sum(value < summary[name] for value in values) < share * len(values)


def answer_with(result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(name: str) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    fake = types.SimpleNamespace(AutoTokenizer=types.SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    monkeypatch.setattr(prepare, "detect_offline", lambda: None)


def test_a_tokenizer_that_is_not_to_be_had_is_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(OSError("We couldn't connect.\nLong story."), monkeypatch)
    with pytest.raises(EnvironmentNotReady, match=r"cannot load the tokenizer a/b: We couldn't connect\.$"):
        prepare.load_tokenizer("a/b")


def test_a_tokenizer_without_a_chat_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(types.SimpleNamespace(chat_template=None), monkeypatch)
    with pytest.raises(InputError, match="no chat template"):
        prepare.load_tokenizer("a/b")

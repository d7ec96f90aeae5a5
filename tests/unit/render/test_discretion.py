"""What looks like a secret is hidden, wherever it stands."""

from __future__ import annotations

import pytest

from flashrl_cli.render.discretion import HIDDEN, safe, safe_word


def test_a_dotted_key_is_judged_by_its_last_name() -> None:
    assert safe("env.HF_TOKEN", "x") == HIDDEN
    assert safe("token.model.path", "x") == "x"


@pytest.mark.parametrize("word", ["train", "--preset", "trainer.steps=6", "--set=trainer.steps=6", "a=b=c", ""])
def test_words_without_secrets_stay(word: str) -> None:
    assert safe_word(word) == word


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("env.HF_TOKEN=abc", f"env.HF_TOKEN={HIDDEN}"),
        ("--set=env.HF_TOKEN=abc", f"--set=env.HF_TOKEN={HIDDEN}"),
        ("+ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY='k'", None),
        ("hf_abcdefghijklmnopqrstuvwxyz0123456789", HIDDEN),
        ("--token=abc", f"--token={HIDDEN}"),
    ],
)
def test_words_with_secrets_keep_their_key_alone(word: str, shown: str | None) -> None:
    assert safe_word(word) == (shown or f"{word.partition('=')[0]}={HIDDEN}")

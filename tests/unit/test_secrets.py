"""Secrets are known by their name or their form, and hidden in a command line."""

from __future__ import annotations

import pytest

from flashrl_cli.secrets import looks_secret, without_secrets

TOKEN = "hf_" + "a" * 34


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "password", "MY_PASSWORD", "GITHUB_TOKEN"]
)
def test_names(name: str) -> None:
    assert looks_secret(name, "x")
    assert not looks_secret(name, "")


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "MAX_TOKENS", "KEYS", "HF_HOME", "SECRETARY", "MONKEY"])
def test_names_that_only_sound_so(name: str) -> None:
    assert not looks_secret(name, "x")


@pytest.mark.parametrize(
    "value", [TOKEN, "sk-" + "b" * 40, "ghp_" + "c" * 36, "AKIA" + "D" * 16, "http://me:pw@host:80"]
)
def test_values(value: str) -> None:
    assert looks_secret("X", value)


@pytest.mark.parametrize("value", ["/models/sk-learn", "http://host:80/a@b", "hf_short", "ghost", "user@host:path"])
def test_values_that_are_none(value: str) -> None:
    assert not looks_secret("X", value)


def test_command_line() -> None:
    words = ("train", "--set", "env.WANDB_API_KEY=abc", "--set", "trainer.steps=3", TOKEN, f"--x={TOKEN}")
    assert without_secrets(words) == (
        "train",
        "--set",
        "env.WANDB_API_KEY=***",
        "--set",
        "trainer.steps=3",
        "***",
        "--x=***",
    )

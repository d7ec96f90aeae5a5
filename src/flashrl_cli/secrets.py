"""Detection of secrets (tokens, passwords, keys), which must never be written to a file or a screen."""

from __future__ import annotations

import re

NAMES = re.compile(
    r"(^|_)(API_?KEY|ACCESS_?KEY|SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|PRIVATE_?KEY)$", re.IGNORECASE
)
"""Names of variables that hold a secret. `TOKENIZERS_PARALLELISM` and `MAX_TOKENS` do not match."""
VALUES = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[A-Z0-9]{16}"
    r"|glpat-[\w-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\w+://[^/\s:@]+:[^/\s@]+@"
)
"""Values of a known form: tokens (Hugging Face, OpenAI, GitHub, AWS, GitLab), private keys, and URLs with a password.
"""
HIDDEN = "***"


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable is a secret, judged by its name or the form of its value; an empty value is not a secret."""
    return bool(value) and bool(NAMES.search(name) or VALUES.search(value))


def without_secrets(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a command line, with the value of every `KEY=VALUE` that looks like a secret hidden."""
    return tuple(_hidden(word) for word in words)


def _hidden(word: str) -> str:
    key, equals, value = word.partition("=")
    if equals and looks_secret(key.rpartition(".")[2], value):
        return f"{key}={HIDDEN}"
    return VALUES.sub(HIDDEN, word)

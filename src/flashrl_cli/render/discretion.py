"""Values as they may be shown to others: what looks like a secret is hidden."""

from __future__ import annotations

from flashrl_cli.secrets import looks_secret

HIDDEN = "(hidden)"


def safe(key: str, value: str) -> str:
    """The value of a dotted `key` or a variable, or `HIDDEN`."""
    return HIDDEN if looks_secret(key.rpartition(".")[2], value) else value


def safe_word(word: str) -> str:
    """A word of a command line or an override, `key=value` or not, with a secret value hidden."""
    key, equals, value = word.partition("=")
    if not equals:
        return safe("", word)
    shown = safe(key, value)
    return f"{key}={safe_word(shown) if key.startswith('--') else shown}"  # --set=key=value

"""What was probably meant: the known names near an unknown one, and the values near one that is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from flashrl_cli.config import yaml_file

CUTOFF = 0.6
"""Likeness, from 0 to 1, below which nobody would see one name in the other (difflib's own default)."""
_WORDS = {
    None: ("", "none", "null", "nil", "off", "no", "false"),
    True: ("true", "yes", "on", "1", "y"),
    False: ("false", "no", "off", "0", "n"),
}
"""How people write null and truth values elsewhere."""


def fold(text: str) -> str:
    """`text` less what is easily typed differently: case, dashes, spaces, quotes around it."""
    return re.sub(r"[-\s]+", "_", text.strip(f" \t'\"-+{yaml_file.QUOTES}").casefold())


def nearest(text: str, names: Iterable[str], count: int = 2) -> list[str]:
    """Up to `count` names that are nearly `text`, the nearest first; one alone if the difference folds away."""
    folded = {fold(name).replace("_", ""): name for name in names}
    written = fold(text).replace("_", "")
    return [
        folded[near] for near in get_close_matches(written, folded, n=1 if written in folded else count, cutoff=CUTOFF)
    ]


def same_key(text: str, keys: Sequence[str]) -> str | None:
    """The key that `text` is, but for what folds away, `/` for dots, or a value that runs on (`lr:1e-6`)."""
    forms = (fold(text).replace("/", "."), re.split("[:=]", fold(text))[0])
    return next((form for form in forms if form in keys), None)


def nearest_keys(text: str, keys: Sequence[str]) -> list[str]:
    """Up to two dotted keys that are nearly `text`; the last name weighs twice what stands before it."""
    head, _, name = fold(text).rpartition(".")
    scores = {}
    for key in keys:
        other_head, _, other = key.rpartition(".")
        alike = _likeness(name, other)
        score = (2 * alike + _ratio(head, other_head)) / 3 if head else alike
        if min(alike, score) >= CUTOFF:
            scores[key] = score
    best = sorted(scores, key=lambda key: -scores[key])[:2]
    return [key for key in best if scores[key] > scores[best[0]] - 0.1]


def readings(value: Any, example: Any = None) -> Iterator[Any]:
    """Yield other ways to read a refused value, the likeliest first; `example` is a value that its key can have."""
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, list) and len(value) == 1:
        yield value[0]
    text = value if isinstance(value, str) else str(value)
    if isinstance(example, tuple | list):
        yield list(dict.fromkeys([*example, *(part.strip() for part in text.split(","))]))
    yield from (meant for meant, words in _WORDS.items() if text.strip().casefold() in words)
    if isinstance(value, str):
        yield from _numbers(text.strip(f" ,;'\"{yaml_file.QUOTES}"))
    elif isinstance(value, bool | int | float):
        yield text.lower()


def _numbers(text: str) -> Iterator[Any]:
    grouped = re.fullmatch(r"[-+]?\d{1,3}([,_]\d{3})+", text)
    plain = re.sub("[,_]", "", text) if grouped else re.sub(r"^(\d+),(\d+)$", r"\1.\2", text)
    number = yaml_file.parse(plain.rstrip("% ") or "null", "").data
    if isinstance(number, int | float):
        yield number / 100 if plain.endswith("%") else number


def _likeness(a: str, b: str) -> float:
    words, others = set(a.split("_")), set(b.split("_"))
    return max(_ratio(a, b), 0.8 if words < others or others < words else 0.0)


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()

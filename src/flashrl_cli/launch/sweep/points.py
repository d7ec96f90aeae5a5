"""The points of a sweep: every combination of values, and what its run is called."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from flashrl_cli.config import yaml_file
from flashrl_cli.config.options import is_text
from flashrl_cli.config.text import text_of
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from flashrl_cli.launch.review import Options
    from flashrl_cli.launch.sweep.axes import Axis

MANY, MOST = 64, 1000
"""Runs that are started without being asked for twice, and runs that a sweep can have at all."""
FLAGS = ("rollout", "tis")
"""Keys that stand for an option of the same name."""
LONGEST_WORD = 40
LONGEST_NAME = 190


@dataclass(frozen=True, slots=True)
class Point:
    """One combination: a text of each key that varies, in the order of the axes."""

    values: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return " ".join(f"{key}={text}" for key, text in self.values)

    def texts(self) -> list[str]:
        """The values as they were written."""
        return [text for _, text in self.values]

    def data(self) -> dict[str, Any]:
        """The values as plain data."""
        return {key: _value(key, text) for key, text in self.values}

    def options(self, given: Options) -> Options:
        """The options of its run; `given` are those that all points share."""
        flags = {key: _flag(key, text) for key, text in self.values if key in FLAGS}
        sets = [f"{key}={text}" for key, text in self.values if key not in FLAGS]
        return replace(given, sets=(*given.sets, *sets), **flags)


def points(axes: Sequence[Axis], *, many: bool = False) -> list[Point]:
    """Every combination of the axes' rows, the last axis varying fastest.

    Raises InputError for more than 64 unless `many`, and for more than 1000.
    """
    count = math.prod(len(axis.rows) for axis in axes)
    if count > MOST:
        raise InputError(f"a sweep of {count:,} runs", hint=f"{MOST:,} at most; keys that go together stand in zip")
    if count > MANY and not many:
        raise InputError(f"a sweep of {count:,} runs", hint=f"--yes starts more than {MANY}")
    return [
        Point(tuple(pair for axis, row in zip(axes, rows, strict=True) for pair in zip(axis.keys, row, strict=True)))
        for rows in itertools.product(*(axis.rows for axis in axes))
    ]


def run_names(bases: Sequence[str], found: Sequence[Point], *, said: Sequence[str] = ()) -> list[str]:
    """A name for each point's run: its base and a word for each value, but for the keys that `said` says are in the base.

    Two points of the same words (paths that end alike) get a hash of their values, too; names depend on nothing else.
    """
    keys = [key for key, _ in found[0].values if key not in said]
    heads = _heads(keys)
    plain = ["-".join([base, *_words(point, heads)]) for base, point in zip(bases, found, strict=True)]
    often = Counter(plain)
    return [
        name if often[name] == 1 and len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{_hash(point)}"
        for name, point in zip(plain, found, strict=True)
    ]


def _heads(keys: Sequence[str]) -> dict[str, str]:
    """What stands for a key in names: as few of its last parts as tell it from the other keys."""
    parts = {key: re.sub(r"[^\w.-]+", "", key, flags=re.ASCII).split(".") for key in keys}
    heads = {}
    for key in keys:
        tails = (".".join(parts[key][-count:]) for count in range(1, len(parts[key])))
        others = [".".join(parts[other]) for other in keys if other != key]
        unique = (tail for tail in tails if not any(f".{other}".endswith(f".{tail}") for other in others))
        heads[key] = next(unique, ".".join(parts[key]))
    return heads


def _words(point: Point, heads: dict[str, str]) -> list[str]:
    return [_word(heads[key], key, text) for key, text in point.values if key in heads]


def _word(head: str, key: str, text: str) -> str:
    said = _short(_value(key, text))
    if key == "rollout":
        return said
    return f"{head}{said}" if key == "tis" or not said[:1].isalpha() else f"{head}_{said}"


def _short(value: Any) -> str:
    """A value as a part of a name: the shorter form of a number, the last part of a path, letters and digits only."""
    text = value if isinstance(value, str) else text_of(value)
    if isinstance(value, float) and math.isfinite(value):
        scientific = f"{Decimal(repr(value)).normalize():e}".replace("e+", "e")
        text = min(text.removesuffix(".0"), scientific, key=len)
    last = text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", last).lstrip(".")[:LONGEST_WORD].rstrip("-.")


def _flag(key: str, text: str) -> str:
    """Text of an option, which takes no quotes as a list's item may have them."""
    value = _value(key, text)
    return value if isinstance(value, str) else text


def _hash(point: Point) -> str:
    return hashlib.sha256(str(point.values).encode()).hexdigest()[:6]


def _value(key: str, text: str) -> Any:
    """What a text is to `--set`, which keeps some keys' as they are; the text itself where it is no value."""
    document = yaml_file.value(text, "", is_text=is_text(key))
    return text if document.problems else document.data

"""Raw rows of one split to the rows that are written: converted, checked, deduplicated, limited."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flashrl_cli.data.recipes import Recipe, dropped
from flashrl_cli.data.rows import BadRow, BadRows, Located, Needs, Place, Row, judge
from flashrl_cli.data.writing import Types

TICK = 500
Built = tuple[Place, Row]


@dataclass(slots=True)
class Unique:
    """Keeps the first of rows with equal prompts; counts the others, and those of them that give another answer."""

    duplicates: int = 0
    conflicts: int = 0

    def keep_first(self, rows: Iterable[Built]) -> Iterator[Built]:
        """Yield the rows whose prompt has not come before."""
        answers: dict[tuple[str, ...], str] = {}
        for place, row in rows:
            prompt, answer = tuple(turn["content"] for turn in row["prompt"]), row["reward_model"]["ground_truth"]
            if prompt not in answers:
                answers[prompt] = answer
                yield place, row
            else:
                self.duplicates += 1
                self.conflicts += answers[prompt] != answer


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of a split that are kept, how many others were there, and in how many rows something was left out."""

    rows: list[Row]
    duplicates: int
    conflicts: int
    dropped: dict[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        longest = max(sum(len(turn["content"]) for turn in row["prompt"]) for row in self.rows)
        return {
            "duplicates": self.duplicates,
            "conflicting_duplicates": self.conflicts,
            "longest_characters": longest,
            "dropped": self.dropped,
        }


def build_split(
    name: str,
    recipe: Recipe,
    located: Iterable[Located],
    *,
    dedupe: bool,
    limit: int | None,
    bad: BadRows,
    advance: Callable[[int], None],
) -> Split:
    """Rows of split `name`, each judged as training would be paid for it; what cannot be used goes to `bad`.

    Reading stops when `limit` rows are kept.
    """
    unique, left_out = Unique(), Counter[str]()
    rows = _converted(name, recipe, located, bad, advance, left_out)
    kept = list(itertools.islice(unique.keep_first(rows) if dedupe else rows, limit))
    types = Types()
    for place, row in kept:
        for fault in types.faults(place, row):
            bad.add(place, fault)
    judge(kept, Needs(), bad)
    return Split([row for _, row in kept], unique.duplicates, unique.conflicts, dict(left_out))


def _converted(
    split: str,
    recipe: Recipe,
    located: Iterable[Located],
    bad: BadRows,
    advance: Callable[[int], None],
    left_out: Counter[str],
) -> Iterator[Built]:
    for index, (place, raw) in enumerate(located):
        if index % TICK == TICK - 1:
            advance(TICK)
        try:
            row = recipe.convert(raw, split, index)
        except BadRow as error:
            bad.add(place, error.fault)
            continue
        left_out.update(dropped(raw, recipe.columns))
        yield place, row

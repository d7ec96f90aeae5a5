"""Raw rows of one split to the rows that are written: converted, checked, deduplicated, limited."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.data.rows import BadRow, BadRows, Row
from flashrl_cli.verl import rewards

if TYPE_CHECKING:
    from flashrl_cli.data.readers import Located
    from flashrl_cli.data.recipes import Convert

TICK = 500


@dataclass(slots=True)
class Unique:
    """Keeps the first of rows with equal prompts; counts the others, and those of them that give another answer."""

    duplicates: int = 0
    conflicts: int = 0

    def keep_first(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows whose prompt has not come before."""
        answers: dict[tuple[str, ...], str] = {}
        for row in rows:
            prompt, answer = tuple(turn["content"] for turn in row["prompt"]), row["reward_model"]["ground_truth"]
            if prompt not in answers:
                answers[prompt] = answer
                yield row
            else:
                self.duplicates += 1
                self.conflicts += answers[prompt] != answer


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of a split that are kept, and how many others were there."""

    rows: list[Row]
    duplicates: int
    conflicts: int

    def counts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        longest = max(sum(len(turn["content"]) for turn in row["prompt"]) for row in self.rows)
        return {"duplicates": self.duplicates, "conflicting_duplicates": self.conflicts, "longest_characters": longest}


def build_split(
    name: str,
    convert: Convert,
    located: Iterable[Located],
    *,
    dedupe: bool,
    limit: int | None,
    bad: BadRows,
    advance: Callable[[int], None],
) -> Split:
    """Rows of split `name`; what cannot be converted goes to `bad`. Reading stops when `limit` rows are kept."""
    unique = Unique()
    rows = _converted(name, convert, located, bad, advance)
    kept = list(itertools.islice(unique.keep_first(rows) if dedupe else rows, limit))
    return Split(kept, unique.duplicates, unique.conflicts)


def _converted(
    split: str, convert: Convert, located: Iterable[Located], bad: BadRows, advance: Callable[[int], None]
) -> Iterator[Row]:
    for index, (where, raw) in enumerate(located):
        if index % TICK == TICK - 1:
            advance(TICK)
        try:
            row = convert(raw, split, index)
            if not rewards.is_scored(row["data_source"]):
                raise BadRow(f"verl has no reward for data_source {row['data_source']!r}")
        except BadRow as error:
            bad.add(where, str(error))
            continue
        yield row

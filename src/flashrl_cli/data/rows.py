"""The row that verl trains on, and what makes a raw row unfit to become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from flashrl_cli.errors import InputError, Problem
from flashrl_cli.text import counted

SHOWN = 5
Raw = Mapping[str, Any]


class Message(TypedDict):
    """One turn of the prompt, before the chat template."""

    role: str
    content: str


class Reward(TypedDict):
    """What the scorer compares a response with."""

    style: str
    ground_truth: str


class Row(TypedDict):
    """One row of verl's parquet files; the columns and their order are those of verl's own preprocess scripts."""

    data_source: str
    prompt: list[Message]
    ability: str
    reward_model: Reward
    extra_info: dict[str, Any]


class BadRow(ValueError):
    """A raw row that cannot become a training row; the message says why."""


def make_row(data_source: str, prompt: str, truth: str, extra: Mapping[str, Any], *, ability: str = "math") -> Row:
    """Row with one user turn and a rule-based reward."""
    return Row(
        data_source=data_source,
        prompt=[Message(role="user", content=prompt)],
        ability=ability,
        reward_model=Reward(style="rule", ground_truth=truth),
        extra_info=dict(extra),
    )


def text(raw: Raw, *columns: str) -> str:
    """Text of the first of `columns` that `raw` has; BadRow if there is none, or it is empty or no text."""
    column = next((name for name in columns if name in raw), None)
    if column is None:
        raise BadRow(f"no column {columns[0]!r} (the row has: {', '.join(map(str, raw)) or 'nothing'})")
    value = raw[column]
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{column!r} is empty")
    return value


class BadRows:
    """Every row of a data set that could not be used: how many there are, and the first few in full."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Problem] = []

    def add(self, where: str, message: str) -> None:
        """Note one bad row; `where` is `file:line`."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(Problem(message, where))

    def check(self, name: str) -> None:
        """Raise InputError if there was any."""
        if self.count:
            shown = f" (the first {SHOWN} are listed)" if self.count > SHOWN else ""
            rows = counted(self.count, "row")
            raise InputError(
                f"{name}: {rows} cannot be used{shown}; nothing was written",
                hint="mend or remove them, then run the same command again",
                problems=self.first,
            )

"""What `flashrl prepare` was asked for, checked as a whole before anything is read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from flashrl_cli.data.recipes import NAMES, RECIPES, TINY
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.paths import DatasetPaths, absolute


class Talk(Protocol):
    """Whom `prepare` tells how it gets on."""

    @property
    def live(self) -> bool:
        """Whether bars may be drawn."""

    def say(self, text: str) -> None:
        """Tell something."""

    def warn(self, text: str) -> None:
        """Tell something that deserves attention."""

    def progress(self, label: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Show how far something is; what it yields is called with the number of rows done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One data set: where to, from what, and how."""

    paths: DatasetPaths
    source: str | None = None
    limit: int | None = None
    tokenizer: str | None = None
    seed: int = 0
    dedupe: bool = True
    offline: bool = False
    force: bool = False


def requests(
    names: Sequence[str],
    *,
    source: str | None = None,
    out: str | None = None,
    limit: int | None = None,
    tokenizer: str | None = None,
    seed: int | None = None,
    dedupe: bool = True,
    offline: bool = False,
    force: bool = False,
) -> list[Request]:
    """One request per name. InputError lists unknown names, and options that the named sets have no use for."""
    given = {"--source": source, "--out": out, "--limit": limit, "--tokenizer": tokenizer, "--seed": seed}
    problems = [*_unknown(names), *_misused(names, {option for option, value in given.items() if value is not None})]
    if problems:
        raise InputError("prepare cannot do that", hint=f"data sets are {', '.join(NAMES)}", problems=problems)
    return [
        Request(
            paths=DatasetPaths(name, absolute(out)) if out else DatasetPaths.named(name),
            source=source,
            limit=limit,
            tokenizer=tokenizer,
            seed=seed or 0,
            dedupe=dedupe,
            offline=offline,
            force=force,
        )
        for name in names
    ]


def _unknown(names: Sequence[str]) -> Iterator[Problem]:
    for name in names:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1)
            yield Problem(f"no data set {name!r}", hint=f"did you mean {close[0]}?" if close else None)


def _misused(names: Sequence[str], given: set[str]) -> Iterator[Problem]:
    made_here = [name for name in names if name in NAMES and (name == TINY or RECIPES[name].hub is None)]
    if len(names) > 1:
        for option in sorted(given & {"--source", "--out"}):
            yield Problem(f"goes with one data set, not {len(names)}", where=option)
    if "--source" in given and made_here:
        yield Problem(f"{' and '.join(made_here)} is made here, from no source", where="--source")
    if "--seed" in given and not made_here:
        yield Problem("only arith and tiny are drawn by a seed", where="--seed")
    for option in sorted(given & {"--limit", "--tokenizer"}) if TINY in names else ():
        yield Problem("tiny comes as it is, with its own tokenizer", where=option)

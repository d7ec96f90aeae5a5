"""Delete checkpoints: what stays and why is decided first, shown, decided again under the run's lock, then done.

What goes is renamed into a hidden folder first, so that nothing half-deleted ever bears a step's name.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.runs import record
from flashrl_cli.runs.saved import DOOMED, hide
from flashrl_cli.runs.stock import refuse_while_running, take_stock

if TYPE_CHECKING:
    from flashrl_cli.paths import RunPaths
    from flashrl_cli.runs.saved import Saved
    from flashrl_cli.runs.stock import Hidden, Stock

KEEP = "last:3,best:1,every:50"
_RULE = re.compile(r"(last|best|every):([1-9]\d{0,8})")


@dataclass(frozen=True, slots=True)
class Keep:
    """What a person wants to keep: so many of the newest, of the best, and each step that `every` divides."""

    last: int = 0
    best: int = 0
    every: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A step, and why it stays; without a reason it goes."""

    saved: Saved
    stays: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """What a prune would do: a verdict on each step, and what goes of what is hidden already."""

    verdicts: tuple[Verdict, ...]
    set_aside: tuple[Hidden, ...] = ()
    leftovers: tuple[Hidden, ...] = ()
    """What an interrupted prune did not delete."""

    @property
    def going(self) -> list[Path]:
        """Everything that goes."""
        hidden = [one.path for one in (*self.set_aside, *self.leftovers)]
        return [verdict.saved.path for verdict in self.verdicts if not verdict.stays] + hidden

    @property
    def freed(self) -> int:
        """Bytes of everything that goes."""
        steps = sum(verdict.saved.bytes for verdict in self.verdicts if not verdict.stays)
        return steps + sum(one.bytes for one in (*self.set_aside, *self.leftovers))


def parse_keep(text: str) -> Keep:
    """`last:3,best:1,every:50` in any order, each at most once. Raises InputError."""
    rules = [_RULE.fullmatch(part.strip()) for part in text.split(",")]
    found = {rule[1]: int(rule[2]) for rule in rules if rule}
    if len(found) != len(rules):
        raise InputError(f"--keep {text}: not understood", hint=f"--keep {KEEP}, or some of it, with numbers from 1 on")
    return Keep(**found)


def judge(stock: Stock, keep: Keep | None, *, set_aside: bool) -> Prune:
    """Decide what goes. Without `keep` no step does; `set_aside` lets go all that was set aside.

    The newest complete step, the best one, and the one that verl goes on from stay always.
    """
    last = [one.step for one in stock.saved if one.complete][-keep.last :] if keep and keep.last else []
    best = stock.scores.ranked()[: keep.best] if keep and stock.scores else []
    if keep and stock.newest is None and stock.saved:
        raise InputError(
            f"no step of run {stock.run.name} is complete, so none is deleted",
            hint=f"`flashrl runs checkpoints {stock.run.name}` says what each lacks",
        )
    verdicts = [Verdict(one, tuple(_reasons(stock, one, keep, last, best))) for one in stock.saved]
    return Prune(
        verdicts=tuple(verdicts),
        set_aside=stock.set_aside if set_aside else (),
        leftovers=stock.leftovers,
    )


def carry_out(run: RunPaths, keep: Keep | None, *, set_aside: bool, shown: Prune) -> None:
    """Delete what `shown` says. Raises InputError if the run is running, or has other checkpoints by now than were shown.

    The run's lock is held while steps are renamed, not while they are deleted: that may take minutes.
    """
    with record.locked(run):
        refuse_while_running(run, "nothing is deleted")
        if judge(take_stock(run), keep, set_aside=set_aside).going != shown.going:
            raise InputError(f"the checkpoints of run {run.name} changed meanwhile; nothing is deleted")
        waiting = [one.path for one in shown.leftovers]
        doomed = [*(hide(path, run.checkpoints / DOOMED) for path in shown.going if path not in waiting), *waiting]
    _delete(doomed)
    with contextlib.suppress(OSError):  # another prune may be at work there
        (run.checkpoints / DOOMED).rmdir()


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:  # another prune is deleting it too
            shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            raise EnvironmentNotReady(
                f"{error.filename} cannot be deleted: {error.strerror}", hint="prune again once it can"
            ) from None


def _reasons(stock: Stock, one: Saved, keep: Keep | None, last: list[int], best: list[int]) -> Iterator[str]:
    if one.path.is_symlink():
        yield "a link"
    if keep is None:
        yield "steps are not pruned without --keep"
        return
    if one.step == stock.newest:
        yield "newest"
    elif one.step in last:
        yield f"last:{keep.last}"
    if one.step == stock.best and stock.scores:
        yield f"best by {stock.scores.by}"
    elif one.step in best:
        yield f"best:{keep.best}"
    if one.tracked:
        yield "verl goes on from it"
    if keep.every and one.has_weights and one.step % keep.every == 0:
        yield f"every:{keep.every}"

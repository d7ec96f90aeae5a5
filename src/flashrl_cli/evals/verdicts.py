"""What an evaluation's numbers allow to be said, as sentences; none claims more than its p-value does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING

from flashrl_cli.evals.paired import ALPHA, Difference, differences
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.evals.compare import Comparison, Entry
    from flashrl_cli.evals.report import Row

_FINE = 0.05
"""A difference, as a share, that an evaluation should be able to tell."""
_LISTED = 12


def on_steps(comparisons: Sequence[Comparison]) -> list[str]:
    """Sentences on each run and data set, and once what the numbers are corrected for."""
    several = len({c.run for c in comparisons}) > 1
    said = []
    for (run, dataset), group in groupby(comparisons, key=lambda c: (c.run, c.dataset)):
        where = f"{run}, {dataset}" if several else dataset
        said += [f"{where}: {sentence}" for sentence in _on_one(list(group))]
    if any(c.among > 1 for c in comparisons):
        said.append("p-values and intervals are corrected for having picked the best of several steps")
    return said


def p_text(p: float) -> str:
    """A p-value as it is written in a sentence."""
    if p < 0.001:
        return "p < 0.001"
    digits = 2 if p >= 0.1 else 3
    if round(p, digits) == ALPHA:
        digits = 4  # what is below the threshold is not shown as the threshold
    return f"p = {p:.{digits}f}"


def points(share: float) -> str:
    """A difference in percentage points."""
    return f"{round(100 * share, 1) + 0.0:.1f}"


def understated(entries: Sequence[Entry]) -> Iterator[str]:
    """A sentence on each extractor that finds significantly more right answers than the strict scorer; `entries` are of one data set."""
    distinct = list({id(entry.result): entry for entry in entries}.values())
    runs = {entry.run for entry in entries}
    run = runs.pop() if len(runs) == 1 else ""
    for extractor in ("flexible", "boxed"):
        gaps = [(d, entry) for d, entry in _gaps(distinct, extractor) if d.significant and d.value > 0]
        if gaps:
            gap, entry = max(gaps, key=lambda pair: pair[0].value)
            yield (
                f"{entry.result.data.name}: the strict accuracy understates: at {entry.called_in(run)} the right answer is given "
                f"{points(gap.value)} points more often ({extractor}) than in the form that the scorer asks for"
            )


def without_verdict(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence on each data set with responses that a scorer (verl's, or that of another extractor) did not judge."""
    for dataset in dict.fromkeys(row.dataset for row in rows):
        found = {row.path: row for row in rows if row.dataset == dataset}.values()
        if count := sum(row.problems for row in found):
            yield (
                f"{dataset}: {count:,} of {sum(row.n for row in found):,} responses got no verdict from a scorer, "
                "for which they count as wrong"
            )


def _on_one(found: Sequence[Comparison]) -> Iterator[str]:
    """Sentences on one run and data set."""
    against = {kind: [c for c in found if c.against == kind] for kind in ("first", "baseline", "step")}
    yield from map(_against_first, against["first"])
    if against["step"] and not against["first"]:
        yield f"{found[0].best}, the first, has the highest accuracy"
    yield from map(_against_baseline, against["baseline"])
    beaten = {c.other for kind in ("first", "baseline") for c in against[kind] if c.difference.significant}
    yield from _among_steps(against["step"], beaten)
    yield from _too_few(found)


def _against_first(c: Comparison) -> str:
    if c.difference.significant:
        return f"{c.best} beats {c.other} by {_amount(c.difference)}"
    return f"{c.best}, the best, is not distinguishable from {c.other}: {_amount(c.difference)}"


def _against_baseline(c: Comparison) -> str:
    what = f"the baseline ({c.other})"
    if not c.difference.significant:
        return f"{c.best}, the best, is not distinguishable from {what}: {_amount(c.difference)}"
    if c.difference.value > 0:
        return f"{c.best} beats {what} by {_amount(c.difference)}"
    return f"{c.best}, the best, falls short of {what} by {_amount(c.difference.turned())}"


def _amount(d: Difference) -> str:
    return f"{points(d.value)} points (95 % {points(d.lo)} to {points(d.hi)}), {p_text(d.adjusted)}"


def _among_steps(found: Sequence[Comparison], beaten: set[str]) -> Iterator[str]:
    """Which steps may be as good as the best, without those that another sentence says are `beaten`."""
    if not found:
        return
    best, clear = found[0].best, [c.difference.adjusted for c in found if c.difference.significant]
    alike = [c.other for c in found if not c.difference.significant and c.other not in beaten]
    shown = ", ".join(name.removeprefix("step ") for name in alike[:_LISTED]) + (", …" if len(alike) > _LISTED else "")
    if clear and len(found) == 1:
        yield f"{best} beats {found[0].other} by {_amount(found[0].difference)}"
    elif clear and not alike:
        yield f"{best} beats every other step, {p_text(max(clear))}"
    elif len(alike) == 1:
        yield f"{alike[0]} and {best} are not distinguishable"
    elif alike:
        yield f"{len(alike)} steps are within noise of the best ({best.removeprefix('step ')}): {shown}"


def _gaps(entries: Sequence[Entry], extractor: str) -> Iterator[tuple[Difference, Entry]]:
    """Share of right answers by an extractor minus the strict one, over the questions that the extractor applies to."""
    strict, loose = [], []
    for entry in entries:
        graded = zip(entry.result.responses, entry.result.grades, strict=True)
        known = [(r.question, g.correct, found) for r, g in graded if (found := getattr(g, extractor)) is not None]
        groups = [list(group) for _, group in groupby(known, key=lambda mark: mark[0])]
        strict.append([sum(mark[1] for mark in group) / len(group) for group in groups])
        loose.append([sum(mark[2] for mark in group) / len(group) for group in groups])
    if strict and strict[0] and len({len(column) for column in strict}) == 1:
        pairs = [(len(entries) + index, index) for index in range(len(entries))]
        single = all(len(marks) == 1 for entry in entries for marks in entry.marks)
        yield from zip(differences([*strict, *loose], pairs, single=single), entries, strict=True)


def _too_few(found: Sequence[Comparison]) -> Iterator[str]:
    reach = median((c.difference.hi - c.difference.lo) / 2 for c in found)
    if reach > _FINE:
        questions = found[0].questions
        what = f"{counted(questions, 'question')} {'is' if questions == 1 else 'are'} too few"
        yield (
            f"{what} to tell a difference of {100 * _FINE:.0f} points: "
            f"the intervals reach {points(reach)} points to either side"
        )

"""The conclusions that an evaluation supports: which steps are better, as sentences, and whether a threshold is met.

Steps are compared in pairs on the same questions; no sentence claims more than its p-value supports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, groupby
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from flashrl_cli.errors import BelowThreshold, InputError, Problem
from flashrl_cli.evals import stats
from flashrl_cli.evals.stats import ALPHA, Difference, Pair, differences
from flashrl_cli.runs.checkpoints import Skipped, model_or_step
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from pathlib import Path

    from flashrl_cli.evals.results import Entry, Evaluated

_DETECTABLE = 0.05
"""A difference, as a share, that an evaluation should be able to detect."""
_LISTED = 12
_EQUAL = 1e-12
"""Tolerance of comparing accuracies: a mean of means may differ from the exact number by this much."""

Against = Literal["first", "baseline", "step", "model"]
Method = Literal["mcnemar", "bootstrap"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The best step of a run on one data set compared with its first step, a baseline, or any other step.

    Several models are compared in the same way (`against` "model"). The difference is corrected for having chosen the
    best: it holds for all `among` pairs that this one was chosen from (each step with the first or with the baseline;
    among later steps, and among models, every pair).
    """

    run: str
    dataset: str
    against: Against
    best: str
    best_step: int | None
    other: str
    other_step: int | None
    difference: Difference
    among: int
    method: Method
    questions: int

    def document(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return {**asdict(self), "significant": self.difference.significant}


def compare(entries: Sequence[Entry], baseline: Entry | None = None) -> list[Comparison]:
    """Compare the best of `entries` with the others: one run's results on one data set, in the order of its steps.

    The first entry is where training began. Raises InputError if they did not answer the same questions.
    """
    everything = [*entries, *([baseline] if baseline else [])]
    columns, method = _columns(everything)
    best = max(range(len(entries)), key=lambda index: (sum(columns[index]), index))
    run = entries[-1].run  # the first may be a base, which belongs to no run
    return [
        one
        for against, pairs in _families(entries, best, baseline)
        for one in _with_best(everything, columns, method, best, against=against, pairs=pairs, run=run)
    ]


def compare_models(entries: Sequence[Entry]) -> list[Comparison]:
    """Compare the best of `entries`, models on one data set, with each other one, the most accurate first.

    Raises InputError if they did not answer the same questions.
    """
    columns, method = _columns(entries)
    best = max(range(len(entries)), key=lambda index: (sum(columns[index]), -index))
    pairs = list(combinations(range(len(entries)), 2))
    found = _with_best(entries, columns, method, best, against="model", pairs=pairs, run="")
    return sorted(found, key=lambda one: one.difference.value)


Columns = list[list[float]]


def _columns(entries: Sequence[Entry]) -> tuple[Columns, Method]:
    """Shares of right responses, [entry][question], and the test that suits them; InputError for other questions."""
    _check_questions([entry.result for entry in entries])
    marks = [entry.marks for entry in entries]
    single = all(len(samples) == 1 for one in marks for samples in one)
    return [[sum(samples) / len(samples) for samples in one] for one in marks], "mcnemar" if single else "bootstrap"


def _with_best(
    entries: Sequence[Entry],
    columns: Columns,
    method: Method,
    best: int,
    *,
    against: Against,
    pairs: Sequence[Pair],
    run: str,
) -> Iterator[Comparison]:
    """Yield the comparisons of `pairs` that include the best entry, corrected for all of them."""
    tested = differences(columns, pairs, single=method == "mcnemar", stepwise=against in {"step", "model"})
    for (a, b), difference in zip(pairs, tested, strict=True):
        if best not in {a, b}:
            continue
        other = b if a == best else a
        yield Comparison(
            run=run,
            dataset=entries[best].result.data.name,
            against=against,
            best=entries[best].called_in(run),
            best_step=entries[best].step,
            other=entries[other].called_in(run),
            other_step=entries[other].step,
            difference=difference if a == best else difference.turned(),
            among=len(pairs),
            method=method,
            questions=len(columns[best]),
        )


def _check_questions(results: Sequence[Evaluated]) -> None:
    """Raise InputError unless all results answered the same questions of the same data set."""
    first = results[0]
    asked = {response.question for response in first.responses}
    for other in results[1:]:
        if other.data.questions != first.data.questions or {r.question for r in other.responses} != asked:
            raise InputError(
                f"{first.checkpoint.path} and {other.checkpoint.path} did not answer the same questions: "
                "they cannot be compared",
                hint="evaluate them together",
            )


def _families(entries: Sequence[Entry], best: int, baseline: Entry | None) -> Iterator[tuple[Against, list[Pair]]]:
    """Yield the pairs of indices among which the best is chosen; a baseline's index follows those of all entries."""
    steps = range(len(entries))
    if best > 0:
        yield "first", [(step, 0) for step in steps[1:]]
    if baseline and entries[best].result is not baseline.result:
        yield "baseline", [(step, len(entries)) for step in steps if entries[step].result is not baseline.result]
    yield "step", list(combinations(steps[1:] if best > 0 else steps, 2))


def on_steps(comparisons: Sequence[Comparison]) -> list[str]:
    """Sentences on each run and data set, and once a sentence on the correction of the numbers."""
    several = len({c.run for c in comparisons}) > 1
    said = []
    for (run, dataset), group in groupby(comparisons, key=lambda c: (c.run, c.dataset)):
        where = f"{run}, {dataset}" if several else dataset
        said += [f"{where}: {sentence}" for sentence in _on_one(list(group))]
    if any(c.among > 1 for c in comparisons):
        said.append("p-values and intervals are corrected for having picked the best of several steps")
    return said


def on_models(comparisons: Sequence[Comparison]) -> list[str]:
    """Sentences on the models of each data set, and once a sentence on the correction of the numbers."""
    said = []
    for dataset, group in groupby(comparisons, key=lambda c: c.dataset):
        found = list(group)
        said += [f"{dataset}: {sentence}" for sentence in (*_on_best_model(found), *_too_few(found))]
    if any(c.among > 1 for c in comparisons):
        said.append("p-values and intervals are corrected for all pairs of models")
    return said


def _on_best_model(found: Sequence[Comparison]) -> Iterator[str]:
    """Yield which models the best one beats, and from which it is not distinguishable."""
    beaten, alike = ([c for c in found if c.difference.significant is is_clear] for is_clear in (True, False))
    best = found[0].best
    if len(beaten) > 1 and not alike:
        yield f"{best} beats every other model, {p_text(max(c.difference.adjusted for c in beaten))}"
    else:
        yield from (f"{best} beats {c.other} by {_amount(c.difference)}" for c in beaten[:_LISTED])
    for c in alike[:_LISTED]:
        yield f"{best}, the best, is not distinguishable from {c.other}: {_amount(c.difference)}"


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


def _among_steps(found: Sequence[Comparison], beaten: set[str]) -> Iterator[str]:
    """Yield which steps may be as good as the best, without those that another sentence reports as `beaten`."""
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


def _too_few(found: Sequence[Comparison]) -> Iterator[str]:
    reach = median((c.difference.hi - c.difference.lo) / 2 for c in found)
    if reach > _DETECTABLE:
        questions = found[0].questions
        what = f"{counted(questions, 'question')} {'is' if questions == 1 else 'are'} too few"
        yield (
            f"{what} to tell a difference of {100 * _DETECTABLE:.0f} points: "
            f"the intervals reach {points(reach)} points to either side"
        )


def _amount(d: Difference) -> str:
    return f"{points(d.value)} points (95 % {points(d.lo)} to {points(d.hi)}), {p_text(d.adjusted)}"


def p_text(p: float) -> str:
    """A p-value in the form used in sentences."""
    if p < 0.001:
        return "p < 0.001"
    digits = 2 if p >= 0.1 else 3
    if round(p, digits) == ALPHA:
        digits = 4  # a value below the threshold must not be rounded to the threshold
    return f"p = {p:.{digits}f}"


def points(share: float) -> str:
    """A difference in percentage points, as text."""
    return f"{round(100 * share, 1) + 0.0:.1f}"


def understated(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield a sentence for each data set and extractor with significantly more right answers than the strict scorer."""
    for dataset in dict.fromkeys(entry.result.data.name for entry in entries):
        of_data = [entry for entry in entries if entry.result.data.name == dataset]
        distinct = list({id(entry.result): entry for entry in of_data}.values())
        runs = {entry.run for entry in of_data}
        run = runs.pop() if len(runs) == 1 else ""
        for extractor in ("flexible", "boxed"):
            gaps = [(d, entry) for d, entry in _gaps(distinct, extractor) if d.significant and d.value > 0]
            if gaps:
                gap, entry = max(gaps, key=lambda pair: pair[0].value)
                yield (
                    f"{dataset}: the strict accuracy understates: at {entry.called_in(run)} the right answer is given "
                    f"{points(gap.value)} points more often ({extractor}) than in the form that the scorer asks for"
                )


def _gaps(entries: Sequence[Entry], extractor: str) -> Iterator[tuple[Difference, Entry]]:
    """Yield the share of right answers by an extractor minus the strict one, over the questions where it applies."""
    strict, loose = [], []
    for entry in entries:
        graded = [[grade for _, grade in samples] for samples in entry.result.by_question()]
        known = [[g for g in grades if getattr(g, extractor) is not None] for grades in graded]
        known = [grades for grades in known if grades]
        strict.append([sum(g.correct for g in grades) / len(grades) for grades in known])
        loose.append([sum(getattr(g, extractor) for g in grades) / len(grades) for grades in known])
    if strict and strict[0] and len({len(column) for column in strict}) == 1:
        pairs = [(len(entries) + index, index) for index in range(len(entries))]
        single = all(len(marks) == 1 for entry in entries for marks in entry.marks)
        yield from zip(differences([*strict, *loose], pairs, single=single), entries, strict=True)


def without_verdict(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield a sentence for each data set with responses that a scorer (verl's or another) did not judge."""
    for dataset in dict.fromkeys(entry.result.data.name for entry in entries):
        # a base is listed as an entry of every run
        results = {id(e.result): e.result for e in entries if e.result.data.name == dataset}.values()
        if count := sum(grade.problem is not None for result in results for grade in result.grades):
            yield (
                f"{dataset}: {count:,} of {sum(len(result.grades) for result in results):,} responses got no verdict "
                "from a scorer, for which they count as wrong"
            )


@dataclass(frozen=True, slots=True)
class Judged:
    """An accuracy that a threshold applies to; the step is None for a model that is not a step of a run."""

    run: str
    step: int | None
    dataset: str
    accuracy: float
    passed: bool

    @property
    def where(self) -> str:
        """The model and data set that were judged."""
        return f"{self.run}{'' if self.step is None else f' step {self.step}'}, {self.dataset}"


@dataclass(frozen=True, slots=True)
class Threshold:
    """The result of `--fail-under` for an evaluation.

    The threshold applies to the final models on every data set: the newest step of each run, and each model that is not
    a step. It does not apply to earlier steps, nor to base and baseline unless nothing else was evaluated. A model that
    should have been judged but could not be evaluated is in `missing` and does not pass: the accuracy of an older step
    does not replace it.
    """

    least: float
    judged: tuple[Judged, ...]
    missing: tuple[Skipped, ...]

    @property
    def passed(self) -> bool:
        """Whether every judged accuracy reaches the threshold and none is missing."""
        return not self.missing and all(one.passed for one in self.judged)

    def document(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "fail_under": self.least,
            "passed": self.passed,
            "judged": [asdict(one) for one in self.judged],
            "missing": [{"path": str(one.path), "reason": one.reason} for one in self.missing],
        }

    def require(self) -> None:
        """Raise BelowThreshold, which names everything that does not pass."""
        if self.passed:
            return
        problems = [
            Problem(f"accuracy {one.accuracy:.6g} is below {self.least:g}", one.where)
            for one in self.judged
            if not one.passed
        ]
        problems += [Problem(f"was not evaluated: {one.reason}", str(one.path)) for one in self.missing]
        raise BelowThreshold(f"--fail-under {self.least:g} is not reached", problems=problems)


def judge(least: float, entries: Sequence[Entry], *, beside: Sequence[Path], skipped: Sequence[Skipped]) -> Threshold:
    """Apply a threshold to the evaluated models; `beside` are the folders of base and baseline."""
    own = [entry for entry in entries if entry.result.checkpoint.path not in beside] or list(entries)
    newest: dict[Path, int] = {}
    for entry in own:
        if entry.step is not None:
            source = entry.result.checkpoint.source
            newest[source] = max(entry.step, newest.get(source, entry.step))
    judged = []
    for entry in own:
        if entry.step is None or entry.step == newest[entry.result.checkpoint.source]:
            accuracy = stats.accuracy(entry.marks).value
            passed = accuracy >= least - _EQUAL
            judged.append(Judged(entry.run, entry.step, entry.result.data.name, accuracy, passed))
    missing = []
    for one in skipped:
        meant = model_or_step(one.path)
        if meant and (meant[1] is None or meant[1] >= newest.get(meant[0], -1)):
            missing.append(one)
    return Threshold(least, tuple(judged), tuple(missing))


def share(option: str, text: str | None) -> float | None:
    """The value of an option that takes a share, None if it is not given. Raises InputError for any other value."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value <= 1:
        return value
    bare = text.strip().removesuffix("%").strip()
    percentage = bare.replace(".", "", 1).isdecimal() and 1 < float(bare) <= 100
    raise InputError(
        f"{option} {text}: a share between 0 and 1", hint=f"{option} {float(bare) / 100 if percentage else 0.5:g}"
    )

"""Which steps of a run are better than which: paired comparisons on the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, groupby
from typing import TYPE_CHECKING, Any, Literal

from flashrl_cli.errors import InputError
from flashrl_cli.evals.paired import Difference, Pair, differences

if TYPE_CHECKING:
    from flashrl_cli.evals.results import Evaluated

Against = Literal["first", "baseline", "step"]
Method = Literal["mcnemar", "bootstrap"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A result under the run and step that a report shows it as: a base is step 0 of every run that began with it."""

    run: str
    step: int | None
    result: Evaluated

    @property
    def name(self) -> str:
        """What a sentence about its run calls it."""
        return "the model" if self.step is None else f"step {self.step}"

    def called_in(self, run: str) -> str:
        """What a sentence about `run` calls it."""
        if run == self.run:
            return self.name
        return self.run if self.step is None else f"{self.run} step {self.step}"

    @property
    def marks(self) -> list[list[bool]]:
        """Whether each response is right, [question][sample]."""
        graded = zip(self.result.responses, self.result.grades, strict=True)
        return [[g.correct for _, g in group] for _, group in groupby(graded, key=lambda pair: pair[0].question)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The best of a run on one data set minus another: its first step, a baseline, or any other step.

    The difference is corrected for having chosen the best: it holds for all `among` pairs that this one was chosen from (each step
    with the first or with the baseline; of later steps among themselves every pair).
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
    """Comparisons of the best of `entries`: one run's results on one data set by step, of which training began with the first.

    Raises InputError if they did not answer the same questions.
    """
    everything = [*entries, *([baseline] if baseline else [])]
    same_questions([entry.result for entry in everything])
    marks = [entry.marks for entry in everything]
    columns = [[sum(samples) / len(samples) for samples in one] for one in marks]
    method: Method = "mcnemar" if all(len(samples) == 1 for one in marks for samples in one) else "bootstrap"
    best = max(range(len(entries)), key=lambda index: (sum(columns[index]), index))
    run = entries[-1].run  # the first may be a base, which is no run's
    found = []
    for against, pairs in _families(entries, best, baseline):
        tested = differences(columns, pairs, single=method == "mcnemar", stepwise=against == "step")
        for other, difference in _of(best, pairs, tested):
            found.append(
                Comparison(
                    run=run,
                    dataset=entries[best].result.data.name,
                    against=against,
                    best=entries[best].called_in(run),
                    best_step=entries[best].step,
                    other=everything[other].called_in(run),
                    other_step=everything[other].step,
                    difference=difference,
                    among=len(pairs),
                    method=method,
                    questions=len(columns[best]),
                )
            )
    return found


def same_questions(results: Sequence[Evaluated]) -> None:
    """Raise InputError unless all answered the same questions of the same data set."""
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
    """Pairs that those with the best are chosen from; a baseline comes behind all entries."""
    steps = range(len(entries))
    if best > 0:
        yield "first", [(step, 0) for step in steps[1:]]
    if baseline and entries[best].result is not baseline.result:
        yield "baseline", [(step, len(entries)) for step in steps if entries[step].result is not baseline.result]
    yield "step", list(combinations(steps[1:] if best > 0 else steps, 2))


def _of(best: int, pairs: Sequence[Pair], found: Sequence[Difference]) -> Iterator[tuple[int, Difference]]:
    """The other one of each pair that `best` is in, and the best minus it."""
    for (a, b), difference in zip(pairs, found, strict=True):
        if a == best:
            yield b, difference
        elif b == best:
            yield a, difference.turned()

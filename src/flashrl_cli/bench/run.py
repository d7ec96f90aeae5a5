"""Measure what was asked for: an engine for each variant in turn, then one scorer for what they sampled; each point is kept at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashrl_cli.bench import child
from flashrl_cli.bench.job import order
from flashrl_cli.bench.pace import Pace
from flashrl_cli.bench.points import SAMPLE, SCORE, START, Point, points
from flashrl_cli.bench.results import Failure, Measured
from flashrl_cli.bench.store import Store
from flashrl_cli.errors import EnvironmentNotReady, FlashrlError
from flashrl_cli.launch.signals import Interrupted

if TYPE_CHECKING:
    from flashrl_cli.bench.request import Request
    from flashrl_cli.bench.variants import Variant
    from flashrl_cli.evals import process


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """How progress is told: in words, by points that are done, with a note; `finished` is called after each that was measured."""

    say: Callable[[str], None]
    advance: Callable[[int, str], None]
    finished: Callable[[Sequence[Measured]], None]


@dataclass(slots=True)
class Session:
    """Work on a request; `measured` grows as points are finished, and holds what there is whenever the work ends."""

    request: Request
    telling: Telling
    measured: list[Measured] = field(init=False)
    _store: Store = field(init=False)
    _pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self._store = Store(self.request.folder, fresh=self.request.fresh)
        self._pace = Pace(self.request.budget, time.monotonic)
        self.measured = [Measured(one, tuple(points(self.request, one))) for one in self.request.variants]

    def work(self) -> None:
        """Measure all that is left. What fails ends its variant, not the others."""
        self.request.folder.mkdir(parents=True, exist_ok=True)
        for one in self.measured:
            self._take(one)
        for one in self.measured:
            with self._kept_apart(one):
                self._measure(one)
        with contextlib.ExitStack() as stack:
            scorer: process.Worker | None = None
            for one in self.measured:
                if ready := self._to_score(one):
                    with self._kept_apart(one):
                        scorer = scorer or stack.enter_context(self._scorer())
                        self._score(one, scorer, *ready)

    def _take(self, one: Measured) -> None:
        """Take what is kept of a variant."""
        for point in one.points:
            if (result := self._store.load(point)) is not None and self._usable(point):
                self._done(one, point, result)

    def _usable(self, point: Point) -> bool:
        return point.kind != SAMPLE or self._store.samples(point).is_file()

    @contextlib.contextmanager
    def _kept_apart(self, one: Measured) -> Iterator[None]:
        """An error within is the variant's own; an interruption is everybody's."""
        try:
            yield
        except Interrupted:
            raise
        except FlashrlError as error:
            one.failure = Failure(error.message, error.hint)
            self.telling.say(f"{one.variant.name} failed: {error.message.splitlines()[0]}")

    def _measure(self, one: Measured) -> None:
        """Everything of a variant that needs its engine."""
        wanted = [point for point in one.left if point.kind != SCORE]
        if not wanted:
            return
        if reason := self.request.machine.lacks(one.variant):
            raise EnvironmentNotReady(reason, hint="flashrl doctor tells which precisions run here")
        start = one.points[0]
        measures = [point for point in wanted if point != start]
        if not self._pace.fits([start, *measures[:1]]):
            one.failure = Failure("left out, the budget has no room for its engine", left_out=True)
            return
        self.telling.say(f"{one.variant.name}: starting an engine{self._and_left()}")
        with child.engine(self.request, one.variant) as engine:
            self._ask(one, start, engine)
            for point in measures:
                if self._has_room(one, point):
                    self._ask(one, point, engine)

    def _has_room(self, one: Measured, point: Point) -> bool:
        if self._pace.fits([point]):
            return True
        one.notes.append(f"{point.label}: left out, the budget has no room for it")
        return False

    def _ask(self, one: Measured, point: Point, worker: process.Worker) -> None:
        """Have a point measured, and keep its result."""
        asked = point.asked | ({"out": str(self._store.samples(point))} if point.kind == SAMPLE else {})
        self._finish(one, point, worker, order(point.kind, **asked))

    def _finish(self, one: Measured, point: Point, worker: process.Worker, text: str) -> None:
        started = time.monotonic()
        for event in worker.ask(text):
            if event["event"] == "advance":
                self.telling.advance(0, f"{point.label}: {event['note']}")
            elif event["event"] == "done":
                result = event["result"]
                if point.kind == START:
                    _check(one.variant, result)
                self._store.save(point, result)
                self._pace.note(point, time.monotonic() - started)
                self._done(one, point, result)
                self.telling.say(f"{point.label}: {_told(point, result)}{self._and_left()}")
                self.telling.finished(self.measured)

    def _done(self, one: Measured, point: Point, result: dict[str, Any]) -> None:
        if point not in one.results:
            self.telling.advance(1, point.label)
        one.results[point] = result

    def _and_left(self) -> str:
        left = self._pace.left(point for one in self.measured if not one.failure for point in one.left)
        return f"; {left}" if left else ""

    @contextlib.contextmanager
    def _scorer(self) -> Iterator[process.Worker]:
        self.telling.say("computing the trainer's log-probs with Transformers")
        with child.scorer(self.request) as worker:
            yield worker

    def _to_score(self, one: Measured) -> tuple[Point, Point] | None:
        """The sampled and the unscored point of a variant, if it has both."""
        sampled = [point for point, _ in one.of(SAMPLE)]
        unscored = [point for point in one.left if point.kind == SCORE]
        return (sampled[0], unscored[0]) if sampled and unscored else None

    def _score(self, one: Measured, scorer: process.Worker, sampled: Point, unscored: Point) -> None:
        if self._has_room(one, unscored):
            self._finish(one, unscored, scorer, order(SCORE, samples=str(self._store.samples(sampled))))


def _check(variant: Variant, facts: dict[str, Any]) -> None:
    """Raise EnvironmentNotReady if some worker holds something else than the variant: its figures would be another one's."""
    for holds in facts["holds"]:
        if problem := variant.contradiction(holds):
            raise EnvironmentNotReady(problem, hint="the engine's log tells more; `flashrl doctor` checks the plugins")


def _told(point: Point, result: dict[str, Any]) -> str:
    """A result in words."""
    match point.kind:
        case "start":
            return f"{result['start_s']:.0f} s to start, {result['kv_tokens']:,} tokens of KV cache"
        case "speed":
            return f"{result['tokens_s']:,.0f} tokens/s"
        case "refit":
            return f"{result['seconds']:.3f} s"
        case "sample":
            return f"{result['tokens']:,} tokens"
        case _:
            return f"mean |Δ log p| {result['abs_difference']['mean']:.4f}"

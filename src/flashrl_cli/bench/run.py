"""Measure what was asked for: an engine for each variant in turn, then one scorer for what they sampled; each point is kept at once.

How long the points that are left will take, told from those that are done, and whether a budget of time has room for them.

What was measured already: one file a point, so that an interrupted benchmark goes on where it was.

The processes that measure, started with what they are told: an engine for one kind of rollouts, and the scorer.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, files
from flashrl_cli.bench.job import (
    SAMPLE,
    SCORE,
    SPEED,
    START,
    EngineJob,
    Failure,
    Measured,
    Point,
    ScorerJob,
    order,
    points,
)
from flashrl_cli.bench.request import FIT
from flashrl_cli.errors import EnvironmentNotReady, FlashrlError
from flashrl_cli.evals import job
from flashrl_cli.train.process import Interrupted
from flashrl_cli.worker import client

if TYPE_CHECKING:
    from flashrl_cli.bench.job import Variant
    from flashrl_cli.bench.request import Request


class Pace:
    """Seconds of points by what they are like; `budget` in seconds counts from the beginning, None is no limit."""

    def __init__(self, budget: float | None, clock: Callable[[], float]) -> None:
        self._budget, self._clock = budget, clock
        self._began = clock()
        self._seconds: dict[tuple[str, int], float] = {}

    def note(self, point: Point, seconds: float) -> None:
        """A point took so long."""
        self._seconds[point.like] = seconds

    def expected(self, point: Point) -> float | None:
        """Seconds that a point will take at most; None if nothing like it was measured. A larger batch takes no more a sequence."""
        if point.like in self._seconds:
            return self._seconds[point.like]
        batch = point.asked.get("batch", FIT)
        # how many sequences fit is known to the engine alone
        speeds = ((size, seconds) for (kind, size), seconds in self._seconds.items() if kind == point.kind == SPEED)
        others = {size: seconds for size, seconds in speeds if FIT not in {size, batch}}
        nearest = min(others, key=lambda size: abs(size - batch), default=None)
        return None if nearest is None else others[nearest] * max(1.0, batch / nearest)

    def fits(self, points: Iterable[Point]) -> bool:
        """Whether the budget has room for `points`; one that nothing is known of counts as nothing."""
        if self._budget is None:
            return True
        return self._clock() - self._began + sum(self.expected(point) or 0.0 for point in points) <= self._budget

    def left(self, points: Iterable[Point]) -> str:
        """How long `points` will take, in words; empty where nothing is known of any."""
        expected = [self.expected(point) for point in points]
        known = [seconds for seconds in expected if seconds is not None]
        if not known:
            return ""
        told = f"{sum(known) / 60:.0f} min" if sum(known) >= 90 else f"{sum(known):.0f} s"
        return f"{'about' if len(known) == len(expected) else 'more than'} {told} left"


SCHEMA_VERSION = 1


class Store:
    """Files of finished points in one folder; with `fresh` those that are there already count for nothing."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self._folder, self._fresh = folder, fresh
        self._made: set[str] = set()

    def load(self, point: Point) -> dict[str, Any] | None:
        """A point's result; None if there is none, or none that can be read."""
        if self._fresh and point.key not in self._made:
            return None
        try:
            data = json.loads(self._file(point).read_text(encoding="utf-8"))
            result: dict[str, Any] = data["result"]
            return result if data["schema_version"] == SCHEMA_VERSION else None
        except (OSError, KeyError, TypeError, ValueError):
            return None

    def save(self, point: Point, result: dict[str, Any]) -> None:
        """Keep a point's result."""
        about = {"variant": point.variant, "kind": point.kind, "asked": point.asked}
        files.write_json(self._file(point), {"schema_version": SCHEMA_VERSION, **about, "result": result})
        self._made.add(point.key)

    def samples(self, point: Point) -> Path:
        """The file of what was sampled for a point."""
        return self._folder / f"{point.key}.npz"

    def _file(self, point: Point) -> Path:
        return self._folder / f"{point.key}.json"


ENGINE, SCORER = "flashrl_cli.bench.engine", "flashrl_cli.bench.scorer"
HINTS = {
    "a GPU ran out of memory": "a smaller --batch or --gpu-memory-utilization, or --tp over more GPUs",
    "a GPU has less free memory than the rollout engine asks for": (
        "a smaller --gpu-memory-utilization, or another GPU by CUDA_VISIBLE_DEVICES"
    ),
    "the rollout engine has no memory left for its KV cache": (
        "a smaller --prompt or --response, or a larger --gpu-memory-utilization (on a CPU: --kv-memory)"
    ),
}
"""What helps here, by cause (verl.causes)."""


@contextlib.contextmanager
def engine_process(request: Request, variant: Variant) -> Iterator[client.Worker]:
    """A process whose first order starts the engine of a variant. However the caller leaves, nothing stays running."""
    died = partial(job.died, who=f"the engine of {variant.name}", hints=HINTS)
    with tempfile.TemporaryDirectory(prefix="flashrl-bench-") as folder:
        work = Path(folder)
        file = work / "job.json"
        _job(request, variant, work).write(file)
        env = client.environment(work, request.devices, _fixed(request, variant), _usual(request))
        with client.worker(ENGINE, file, _log(request, variant.name), env, died) as worker:
            yield worker


@contextlib.contextmanager
def scorer(request: Request) -> Iterator[client.Worker]:
    """A process that holds the model as the trainer computes with it."""
    died = partial(job.died, who="the scorer", hints=HINTS)
    dtype = request.mismatch.dtype if request.mismatch else "bfloat16"
    with tempfile.TemporaryDirectory(prefix="flashrl-bench-") as folder:
        work = Path(folder)
        file = work / "job.json"
        ScorerJob(model=str(request.model.folder(work)), dtype=dtype).write(file)
        env = client.environment(work, request.devices, {})
        with client.worker(SCORER, file, _log(request, "scorer"), env, died) as worker:
            yield worker


def _log(request: Request, name: str) -> Path:
    """A log with nothing in it yet."""
    log = request.log(name)
    log.unlink(missing_ok=True)
    return log


def _job(request: Request, variant: Variant, work: Path) -> EngineJob:
    questions = None
    if request.mismatch:
        questions = work / "questions.jsonl"
        asked = request.mismatch.questions[: request.mismatch.samples]
        questions.write_text("".join(json.dumps(one.prompt) + "\n" for one in asked), encoding="utf-8")
    weights = request.model.weights
    return EngineJob(
        model=str(request.model.folder(work)),
        weights=weights.plain() if weights else None,
        arguments=variant.arguments(request.model.layers),
        options=request.engine,
        questions=str(questions) if questions else None,
        response=request.response,
        longest=request.longest,
    )


def _fixed(request: Request, variant: Variant) -> dict[str, str]:
    """What the plugins are told, and the size of the KV cache where vLLM takes it from the environment."""
    cache = request.engine.kv_memory
    room = {"VLLM_CPU_KVCACHE_SPACE": str(math.ceil(cache))} if cache and request.machine.kind == "cpu" else {}
    return {contract.ENV_ROLLOUT: variant.options().text(), **room}


def _usual(request: Request) -> dict[str, str]:
    """On a GPU vLLM keeps its scheduler in a process of its own, as in RL; on a CPU that only costs memory and time."""
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if request.machine.kind == "cpu" else {}


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
            scorer: client.Worker | None = None
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
        with engine_process(self.request, one.variant) as engine:
            self._ask(one, start, engine)
            for point in measures:
                if self._has_room(one, point):
                    self._ask(one, point, engine)

    def _has_room(self, one: Measured, point: Point) -> bool:
        if self._pace.fits([point]):
            return True
        one.notes.append(f"{point.label}: left out, the budget has no room for it")
        return False

    def _ask(self, one: Measured, point: Point, worker: client.Worker) -> None:
        """Have a point measured, and keep its result."""
        asked = point.asked | ({"out": str(self._store.samples(point))} if point.kind == SAMPLE else {})
        self._finish(one, point, worker, order(point.kind, **asked))

    def _finish(self, one: Measured, point: Point, worker: client.Worker, text: str) -> None:
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
    def _scorer(self) -> Iterator[client.Worker]:
        self.telling.say("computing the trainer's log-probs with Transformers")
        with scorer(self.request) as worker:
            yield worker

    def _to_score(self, one: Measured) -> tuple[Point, Point] | None:
        """The sampled and the unscored point of a variant, if it has both."""
        sampled = [point for point, _ in one.of(SAMPLE)]
        unscored = [point for point in one.left if point.kind == SCORE]
        return (sampled[0], unscored[0]) if sampled and unscored else None

    def _score(self, one: Measured, scorer: client.Worker, sampled: Point, unscored: Point) -> None:
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

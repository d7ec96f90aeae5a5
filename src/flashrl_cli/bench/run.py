"""Measurement of a request: one engine for each variant in turn, then one scorer for their samples.

Each finished point is one file, so an interrupted benchmark continues where it was. The time that the remaining points
will take is estimated from the finished ones; a time budget skips points for which no time is left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashrl_cli import contract, files
from flashrl_cli.bench.job import EngineJob, Variant
from flashrl_cli.bench.request import FIT, Request
from flashrl_cli.errors import EnvironmentNotReady, FlashrlError
from flashrl_cli.signals import Interrupted
from flashrl_cli.text import counted
from flashrl_cli.worker import client

REFITS = 5
START, SPEED, REFIT, SAMPLE, SCORE = KINDS = ("start", "speed", "refit", "sample", "score")
"""Kinds of points and of orders. The scorer handles `score`, an engine all others; its first order starts it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement: `asked` is the content of its order, `key` names everything that its result depends on."""

    variant: str
    kind: str
    asked: dict[str, Any] = field(hash=False)
    key: str

    @property
    def label(self) -> str:
        """The point's name in messages."""
        if self.kind != SPEED:
            return f"{self.variant}, {self.kind}"
        batch = self.asked["batch"]
        return f"{self.variant}, {counted(batch, 'sequence') if batch else 'as many as fit'}"

    @property
    def like(self) -> tuple[str, int]:
        """A value that is equal for points of other variants that take about as long."""
        return self.kind, self.asked.get("batch", 0)


def points(request: Request, variant: Variant) -> Iterator[Point]:
    """Points of a variant in their order. Refits come last, because the engine then holds random weights."""
    yield _point(request, variant, START, {})
    for batch in request.batches:
        sizes = {"batch": batch, "prompt": request.prompt, "response": request.response, "repeats": request.repeats}
        yield _point(request, variant, SPEED, sizes)
    if request.mismatch:
        asked = {"samples": request.mismatch.samples, "response": request.response}
        yield _point(request, variant, SAMPLE, asked, request.mismatch.fingerprint)
        yield _point(request, variant, SCORE, {}, [asked, request.mismatch.fingerprint, request.mismatch.dtype])
    if request.refit:
        yield _point(request, variant, REFIT, {"repeats": REFITS})


def count(request: Request) -> int:
    """Number of points of all variants."""
    return sum(1 for variant in request.variants for _ in points(request, variant))


def _point(request: Request, variant: Variant, kind: str, asked: dict[str, Any], more: Any = None) -> Point:
    depends = {
        "model": request.model.fingerprint,
        "variant": variant.key(),
        "kind": kind,
        "asked": asked,
        "more": more,
        "options": asdict(request.options),
        "versions": request.versions,
        "device": request.machine.device,
    }
    text = json.dumps(depends, sort_keys=True)
    return Point(variant=variant.name, kind=kind, asked=asked, key=hashlib.sha256(text.encode()).hexdigest()[:24])


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a variant, or the rest of it, has no results.

    `left_out` says that the time budget had no room for it, which is not an error.
    """

    message: str
    hint: str | None = None
    left_out: bool = False


@dataclass(slots=True)
class Measured:
    """The state of a variant: results by point, and errors."""

    variant: Variant
    points: tuple[Point, ...]
    results: dict[Point, dict[str, Any]] = field(default_factory=dict)
    failure: Failure | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[Point]:
        """Points that have no result yet."""
        return [point for point in self.points if point not in self.results]

    def of(self, kind: str) -> list[tuple[Point, dict[str, Any]]]:
        """Points of a kind that have a result, with the result."""
        return [(point, result) for point, result in self.results.items() if point.kind == kind]


class Pace:
    """Durations of similar points; `budget` is in seconds from the beginning, None for no limit."""

    def __init__(self, budget: float | None, clock: Callable[[], float]) -> None:
        self._budget, self._clock = budget, clock
        self._began = clock()
        self._seconds: dict[tuple[str, int], float] = {}

    def note(self, point: Point, seconds: float) -> None:
        """Record the duration of a point."""
        self._seconds[point.like] = seconds

    def expected(self, point: Point) -> float | None:
        """Upper estimate of a point's duration in seconds; None if no similar point was measured.

        A sequence of a larger batch takes no longer than one of a smaller batch.
        """
        if point.like in self._seconds:
            return self._seconds[point.like]
        batch = point.asked.get("batch", FIT)
        # only the engine knows how many sequences fit
        speeds = ((size, seconds) for (kind, size), seconds in self._seconds.items() if kind == point.kind == SPEED)
        others = {size: seconds for size, seconds in speeds if FIT not in {size, batch}}
        nearest = min(others, key=lambda size: abs(size - batch), default=None)
        return None if nearest is None else others[nearest] * max(1.0, batch / nearest)

    def fits(self, points: Iterable[Point]) -> bool:
        """Whether the budget has room for `points`; a point with an unknown duration counts as 0 s."""
        if self._budget is None:
            return True
        return self._clock() - self._began + sum(self.expected(point) or 0.0 for point in points) <= self._budget

    def left(self, points: Iterable[Point]) -> str:
        """The time that `points` will take, in words; empty if it is not known for any of them."""
        expected = [self.expected(point) for point in points]
        known = [seconds for seconds in expected if seconds is not None]
        if not known:
            return ""
        time_left = f"{sum(known) / 60:.0f} min" if sum(known) >= 90 else f"{sum(known):.0f} s"
        return f"{'about' if len(known) == len(expected) else 'more than'} {time_left} left"


SCHEMA_VERSION = 1


class Store:
    """Files of finished points in one folder; if `fresh`, those from earlier benchmarks are ignored."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self._folder, self._fresh = folder, fresh
        self._made: set[str] = set()

    def load(self, point: Point) -> dict[str, Any] | None:
        """A point's result; None if there is none that can be read."""
        if self._fresh and point.key not in self._made:
            return None
        try:
            data = json.loads(self._file(point).read_text(encoding="utf-8"))
            result: dict[str, Any] = data["result"]
            return result if data["schema_version"] == SCHEMA_VERSION else None
        except (OSError, KeyError, TypeError, ValueError):
            return None

    def save(self, point: Point, result: dict[str, Any]) -> None:
        """Write a point's result to its file."""
        about = {"variant": point.variant, "kind": point.kind, "asked": point.asked}
        files.write_json(self._file(point), {"schema_version": SCHEMA_VERSION, **about, "result": result})
        self._made.add(point.key)

    def samples(self, point: Point) -> Path:
        """The file with the samples of a point."""
        return self._folder / f"{point.key}.npz"

    def _file(self, point: Point) -> Path:
        return self._folder / f"{point.key}.json"


ENGINE, SCORER = "flashrl_cli.bench.engine", "flashrl_cli.bench.scorer"
HINTS = {
    "gpu-memory": "a smaller --batch or --gpu-memory-utilization, or --tp over more GPUs",
    "gpu-occupied": "a smaller --gpu-memory-utilization, or another GPU by CUDA_VISIBLE_DEVICES",
    "gpu-shared": "a KV cache of a fixed size, by --kv-memory GIB",
    "kv-memory": "a smaller --prompt or --response, or a larger --gpu-memory-utilization (on a CPU: --kv-memory)",
}
"""Fixes in a benchmark, by the id of a cause (verl.causes)."""


@contextlib.contextmanager
def engine_process(request: Request, variant: Variant) -> Iterator[client.Worker]:
    """A process whose first order starts the engine of a variant; it is ended with the context."""
    with tempfile.TemporaryDirectory(prefix="flashrl-bench-") as folder:
        work = Path(folder)
        job = asdict(_job(request, variant, work))
        # on a GPU vLLM has its scheduler in a separate process, as in RL; on a CPU that only costs memory and time
        usual = client.ONE_PROCESS if request.machine.kind == "cpu" else {}
        fixed = {contract.ENV_ROLLOUT: variant.options().text()}
        env = client.environment(work, request.devices, fixed, usual)
        who = f"the engine of {variant.name}"
        with client.worker(ENGINE, job, work, _log(request, variant.name), env, who=who, hints=HINTS) as worker:
            yield worker


@contextlib.contextmanager
def scorer(request: Request) -> Iterator[client.Worker]:
    """A process that holds the model in the trainer's precision, to score samples."""
    dtype = request.mismatch.dtype if request.mismatch else "bfloat16"
    with tempfile.TemporaryDirectory(prefix="flashrl-bench-") as folder:
        work = Path(folder)
        job = {"model": str(request.model.folder(work)), "dtype": dtype}
        env = client.environment(work, request.devices, {})
        with client.worker(SCORER, job, work, _log(request, "scorer"), env, who="the scorer", hints=HINTS) as worker:
            yield worker


def _log(request: Request, name: str) -> Path:
    """An empty log file."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Callbacks for progress: `say` for messages, `advance` for finished points, `finished` after each measurement."""

    say: Callable[[str], None]
    advance: Callable[[int, str], None]
    finished: Callable[[Sequence[Measured]], None]


@dataclass(slots=True)
class Session:
    """The work on a request; `measured` grows as points are finished, and is valid whenever the work ends."""

    request: Request
    progress: Progress
    measured: list[Measured] = field(init=False)
    _store: Store = field(init=False)
    _pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self._store = Store(self.request.folder, fresh=self.request.fresh)
        self._pace = Pace(self.request.budget, time.monotonic)
        self.measured = [Measured(one, tuple(points(self.request, one))) for one in self.request.variants]

    def work(self) -> None:
        """Measure all remaining points. An error ends its variant, not the others."""
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
        """Load the finished points of a variant."""
        for point in one.points:
            lost = point.kind == SAMPLE and not self._store.samples(point).is_file()
            if not lost and (result := self._store.load(point)) is not None:
                self._done(one, point, result)

    @contextlib.contextmanager
    def _kept_apart(self, one: Measured) -> Iterator[None]:
        """Context in which an error ends only this variant; an interruption ends all."""
        try:
            yield
        except Interrupted:
            raise
        except FlashrlError as error:
            one.failure = Failure(error.message, error.hint)
            self.progress.say(f"{one.variant.name} failed: {error.message.splitlines()[0]}")

    def _measure(self, one: Measured) -> None:
        """Measure all points of a variant that need its engine."""
        wanted = [point for point in one.left if point.kind != SCORE]
        if not wanted:
            return
        if reason := self.request.machine.lacks(one.variant):
            raise EnvironmentNotReady(reason, hint="flashrl doctor says which precisions run here")
        start = one.points[0]
        measures = [point for point in wanted if point != start]
        if not self._pace.fits([start, *measures[:1]]):
            one.failure = Failure("left out, the budget has no room for its engine", left_out=True)
            return
        self.progress.say(f"{one.variant.name}: starting an engine{self._and_left()}")
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
        """Let the worker measure a point, and save its result."""
        asked = point.asked | ({"out": str(self._store.samples(point))} if point.kind == SAMPLE else {})
        self._finish(one, point, worker, asked)

    def _finish(self, one: Measured, point: Point, worker: client.Worker, asked: dict[str, Any]) -> None:
        started = time.monotonic()
        for event in worker.ask({"kind": point.kind, **asked}):
            if event["event"] == "advance":
                self.progress.advance(0, f"{point.label}: {event['note']}")
            elif event["event"] == "done":
                result = event["result"]
                if point.kind == START:
                    _check(one.variant, result)
                self._store.save(point, result)
                self._pace.note(point, time.monotonic() - started)
                self._done(one, point, result)
                self.progress.say(f"{point.label}: {_in_words(point, result)}{self._and_left()}")
                self.progress.finished(self.measured)

    def _done(self, one: Measured, point: Point, result: dict[str, Any]) -> None:
        if point not in one.results:
            self.progress.advance(1, point.label)
        one.results[point] = result

    def _and_left(self) -> str:
        left = self._pace.left(point for one in self.measured if not one.failure for point in one.left)
        return f"; {left}" if left else ""

    @contextlib.contextmanager
    def _scorer(self) -> Iterator[client.Worker]:
        self.progress.say("computing the trainer's log-probs with Transformers")
        with scorer(self.request) as worker:
            yield worker

    def _to_score(self, one: Measured) -> tuple[Point, Point] | None:
        """The sampled and the unscored point of a variant; None if it does not have both."""
        sampled = [point for point, _ in one.of(SAMPLE)]
        unscored = [point for point in one.left if point.kind == SCORE]
        return (sampled[0], unscored[0]) if sampled and unscored else None

    def _score(self, one: Measured, scorer: client.Worker, sampled: Point, unscored: Point) -> None:
        if self._has_room(one, unscored):
            self._finish(one, unscored, scorer, {"samples": str(self._store.samples(sampled))})


def _check(variant: Variant, facts: dict[str, Any]) -> None:
    """Raise EnvironmentNotReady if some GPU's engine differs from the variant."""
    for holds in facts["holds"]:
        if problem := variant.contradiction(holds):
            raise EnvironmentNotReady(problem, hint="the engine's log says more; `flashrl doctor` checks the plugins")


def _in_words(point: Point, result: dict[str, Any]) -> str:
    """A point's result in words."""
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

"""Measure what was asked for: an engine for each variant in turn, then one scorer for what they sampled.

Each finished point is one file, so that an interrupted benchmark goes on where it was. How long the points that are
left will take is estimated from those that are done; a budget of time leaves out what it has no room for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
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
"""Kinds of points and of orders: `score` is the scorer's, the others are an engine's, whose first order starts it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement: `asked` are the words of the order for it, `key` names everything that its result depends on."""

    variant: str
    kind: str
    asked: dict[str, Any] = field(hash=False)
    key: str

    @property
    def label(self) -> str:
        """As it is named in messages."""
        if self.kind != SPEED:
            return f"{self.variant}, {self.kind}"
        batch = self.asked["batch"]
        return f"{self.variant}, {counted(batch, 'sequence') if batch else 'as many as fit'}"

    @property
    def like(self) -> tuple[str, int]:
        """Equal for points of other variants that take about as long."""
        return self.kind, self.asked.get("batch", 0)


def points(request: Request, variant: Variant) -> Iterator[Point]:
    """Points of a variant in their order: the refits come last, after them the engine holds random weights."""
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
    """Points of all variants."""
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
    """Why a variant, or the rest of it, has no figures; `left_out`: the budget had no room, which is no failure."""

    message: str
    hint: str | None = None
    left_out: bool = False


@dataclass(slots=True)
class Measured:
    """What is known of a variant: results by point, and what went wrong."""

    variant: Variant
    points: tuple[Point, ...]
    results: dict[Point, dict[str, Any]] = field(default_factory=dict)
    failure: Failure | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[Point]:
        """Points without a result."""
        return [point for point in self.points if point not in self.results]

    def of(self, kind: str) -> list[tuple[Point, dict[str, Any]]]:
        """Points of a kind that have a result."""
        return [(point, result) for point, result in self.results.items() if point.kind == kind]


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
        """Seconds that a point will take at most; None if nothing like it was measured.

        A sequence of a larger batch takes no longer than one of a smaller.
        """
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
        time_left = f"{sum(known) / 60:.0f} min" if sum(known) >= 90 else f"{sum(known):.0f} s"
        return f"{'about' if len(known) == len(expected) else 'more than'} {time_left} left"


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
    "gpu-memory": "a smaller --batch or --gpu-memory-utilization, or --tp over more GPUs",
    "gpu-occupied": ("a smaller --gpu-memory-utilization, or another GPU by CUDA_VISIBLE_DEVICES"),
    "kv-memory": ("a smaller --prompt or --response, or a larger --gpu-memory-utilization (on a CPU: --kv-memory)"),
}
"""What helps here, by a cause's id (verl.causes)."""


@contextlib.contextmanager
def engine_process(request: Request, variant: Variant) -> Iterator[client.Worker]:
    """A process whose first order starts the engine of a variant. However the caller leaves, nothing stays running."""
    with tempfile.TemporaryDirectory(prefix="flashrl-bench-") as folder:
        work = Path(folder)
        job = asdict(_job(request, variant, work))
        # on a GPU vLLM keeps its scheduler in a process of its own, as in RL; on a CPU that only costs memory and time
        usual = client.ONE_PROCESS if request.machine.kind == "cpu" else {}
        env = client.environment(work, request.devices, _fixed(request, variant), usual)
        who = f"the engine of {variant.name}"
        with client.worker(ENGINE, job, work, _log(request, variant.name), env, who=who, hints=HINTS) as worker:
            yield worker


@contextlib.contextmanager
def scorer(request: Request) -> Iterator[client.Worker]:
    """A process that holds the model as the trainer computes with it."""
    dtype = request.mismatch.dtype if request.mismatch else "bfloat16"
    with tempfile.TemporaryDirectory(prefix="flashrl-bench-") as folder:
        work = Path(folder)
        job = {"model": str(request.model.folder(work)), "dtype": dtype}
        env = client.environment(work, request.devices, {})
        with client.worker(SCORER, job, work, _log(request, "scorer"), env, who="the scorer", hints=HINTS) as worker:
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
    """Options of the plugins, and the size of the KV cache where vLLM reads it from the environment."""
    cache = request.engine.kv_memory
    room = {"VLLM_CPU_KVCACHE_SPACE": str(math.ceil(cache))} if cache and request.machine.kind == "cpu" else {}
    return {contract.ENV_ROLLOUT: variant.options().text(), **room}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How progress is reported: in words, and by points that are done; `finished` is called after each measured one."""

    say: Callable[[str], None]
    advance: Callable[[int, str], None]
    finished: Callable[[Sequence[Measured]], None]


@dataclass(slots=True)
class Session:
    """Work on a request; `measured` grows as points are finished, and holds what there is whenever the work ends."""

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
            lost = point.kind == SAMPLE and not self._store.samples(point).is_file()
            if not lost and (result := self._store.load(point)) is not None:
                self._done(one, point, result)

    @contextlib.contextmanager
    def _kept_apart(self, one: Measured) -> Iterator[None]:
        """An error within is the variant's own; an interruption is everybody's."""
        try:
            yield
        except Interrupted:
            raise
        except FlashrlError as error:
            one.failure = Failure(error.message, error.hint)
            self.progress.say(f"{one.variant.name} failed: {error.message.splitlines()[0]}")

    def _measure(self, one: Measured) -> None:
        """Everything of a variant that needs its engine."""
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
        """Have a point measured, and keep its result."""
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
        """The sampled and the unscored point of a variant, if it has both."""
        sampled = [point for point, _ in one.of(SAMPLE)]
        unscored = [point for point in one.left if point.kind == SCORE]
        return (sampled[0], unscored[0]) if sampled and unscored else None

    def _score(self, one: Measured, scorer: client.Worker, sampled: Point, unscored: Point) -> None:
        if self._has_room(one, unscored):
            self._finish(one, unscored, scorer, {"samples": str(self._store.samples(sampled))})


def _check(variant: Variant, facts: dict[str, Any]) -> None:
    """Raise EnvironmentNotReady if some GPU holds something else than the variant."""
    for holds in facts["holds"]:
        if problem := variant.contradiction(holds):
            raise EnvironmentNotReady(problem, hint="the engine's log says more; `flashrl doctor` checks the plugins")


def _in_words(point: Point, result: dict[str, Any]) -> str:
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

"""Evaluate checkpoints: one engine per architecture, responses graded while the next are generated, each result kept at once.

When to look for new checkpoints of runs that are still training.

An evaluation from request to report: once, or as long as the runs behind it go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from flashrl_cli import paths
from flashrl_cli.errors import NothingMatched
from flashrl_cli.evals import job as child
from flashrl_cli.evals import request as devices
from flashrl_cli.evals import results
from flashrl_cli.evals.graders import Graders
from flashrl_cli.evals.job import Job, Order
from flashrl_cli.evals.report import Report
from flashrl_cli.evals.results import DataSet, Evaluated, Grade, Response
from flashrl_cli.evals.store import Store, Unit, units
from flashrl_cli.runs import store
from flashrl_cli.runs.checkpoints import Checkpoint, Skipped, nothing
from flashrl_cli.text import counted
from flashrl_cli.verl.checkpoints import step_name
from flashrl_cli.weights import Unreadable, read_json

if TYPE_CHECKING:
    from filelock import FileLock

    from flashrl_cli.evals.job import EngineSettings, Sampling
    from flashrl_cli.evals.questions import Question
    from flashrl_cli.evals.request import Request
    from flashrl_cli.runs.store import Run

# Keys of config.json that saving a policy again may change, and that responses do not depend on here.
_VOLATILE = frozenset({
    "_name_or_path", "dtype", "torch_dtype", "attn_implementation", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
})  # fmt: skip


class Grader(Protocol):
    """What judges responses (evals.pool)."""

    def grade(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Grade]:
        """A grade for each of `responses`, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """How an evaluation tells its progress: in words, and by prompts and tokens that are done, over all units together."""

    say: Callable[[str], None]
    advance: Callable[[int, int], None]


@dataclass(slots=True)
class Speed:
    """Tokens per second since the first ones came."""

    _tokens: int = 0
    _began: float | None = None

    def after(self, tokens: int) -> str:
        """The speed after `tokens` more, in words; empty as long as there is none."""
        now = time.monotonic()
        if self._began is None:
            self._began = now if tokens else None
            return ""
        self._tokens += tokens
        return f"{self._tokens / (now - self._began):,.0f} tokens/s" if now > self._began else ""


@dataclass(slots=True)
class _Running:
    """The engine that is up, and for which checkpoints it can be used."""

    architecture: str
    engine: child.Engine
    closing: contextlib.ExitStack


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """Work on units, with an engine that stays up between them; use it as a context.

    `graders` is called when there is something to do, and starts them then. `results` and `skipped` grow as units are finished.
    """

    store: Store
    data: tuple[DataSet, ...]
    sampling: Sampling
    engine: EngineSettings
    log: Path
    graders: Callable[[], Grader]
    telling: Telling
    devices: str | None = None
    results: dict[str, Evaluated] = field(default_factory=dict, init=False)
    skipped: dict[Path, Skipped] = field(default_factory=dict, init=False)
    _told: set[Path] = field(default_factory=set, init=False)
    _up: _Running | None = field(default=None, init=False)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _grading: list[Future[None]] = field(default_factory=list, init=False)
    _claims: set[FileLock] = field(default_factory=set, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_engine()
        self._thread.shutdown(wait=False, cancel_futures=True)
        for lock in list(self._claims):
            lock.release()

    def work(self, units: Iterable[Unit]) -> None:
        """Finish `units`: what is kept is taken, what another evaluation works on comes last.

        Raises RunFailed if an engine died.
        """
        different = {unit.key: unit for unit in units}.values()
        left = [unit for unit in different if not self._take(unit)]
        elsewhere = [unit for unit in left if not self._try(unit)]
        if elsewhere:
            self.telling.say(f"waiting for another evaluation: {_names(elsewhere)}")
        for unit in elsewhere:
            if not self._take(unit):
                self._do(unit, self._claim(unit, wait=True))
        for future in self._grading:
            future.result()
        self._grading.clear()

    def pass_over(self, skipped: Iterable[Skipped]) -> None:
        """Tell of what is not evaluated, each thing once, and as soon as that is known: the rest may take hours."""
        for one in skipped:
            if one.path not in self._told:
                self._told.add(one.path)
                self.telling.say(f"warning: skipped {one.path}: {one.reason}")

    def _take(self, unit: Unit) -> bool:
        """Whether nothing is left to do for a unit."""
        if unit.checkpoint.path in self.skipped:
            self.telling.advance(len(unit.data.questions), 0)
            return True
        kept = self.store.load(unit)
        if kept is None:
            return False
        self.results[unit.key] = kept
        self.telling.advance(len(unit.data.questions), 0)
        return True

    def _try(self, unit: Unit) -> bool:
        """Do a unit, unless another evaluation is at it."""
        lock = self._claim(unit)
        if lock:
            self._do(unit, lock)
        return lock is not None

    def _claim(self, unit: Unit, *, wait: bool = False) -> FileLock | None:
        lock = self.store.claim(unit, wait=wait)
        if lock:
            self._claims.add(lock)
        return lock

    def _do(self, unit: Unit, lock: FileLock | None) -> None:
        if self._take(unit):  # finished by another evaluation since we looked
            self._release(lock)
            return
        file = self.store.answers(unit)
        before = results.read_answers(file)
        self.telling.advance(len(before), 0)
        try:
            self._engine_for(unit)
        except Unreadable as error:  # a training run may have removed it since we looked
            self._skip(unit, str(error), done=len(before))
            self._release(lock)
            return
        order = Order(
            weights=unit.checkpoint.weights, data=self.data.index(unit.data), answers=file, answered=tuple(before)
        )
        holds: dict[str, Any] = {}
        counted, tokens = len(before), 0
        for event in self._events(unit, order):
            match event["event"]:
                case "stage":
                    self.telling.say(event["text"])
                case "loaded":
                    holds = event["holds"]
                case "advance":
                    counted, tokens = counted + event["prompts"], tokens + event["tokens"]
                    self.telling.advance(event["prompts"], event["tokens"])
                case "skipped":
                    self._skip(unit, event["reason"], done=counted)
                    if event["ends"]:
                        self._stop_engine()
                    self._release(lock)
                case "done":
                    self._say_done(unit, tokens, event["seconds"])
                    work = self._thread.submit(self._finish, unit, holds, event["seconds"], lock)
                    self._grading.append(work)

    def _finish(self, unit: Unit, holds: dict[str, Any], seconds: float, lock: FileLock | None) -> None:
        """Grade what was answered, and keep it (in a thread of its own, while the engine goes on)."""
        found = results.read_answers(self.store.answers(unit))
        responses = tuple(sample for number in sorted(found) for sample in found[number])
        grades = tuple(self.graders().grade(unit.data.questions, responses))
        evaluated = Evaluated(
            checkpoint=unit.checkpoint, data=unit.data, responses=responses, grades=grades, holds=holds, seconds=seconds
        )
        self.store.save(unit, evaluated)
        self.results[unit.key] = evaluated
        self._release(lock)

    def _skip(self, unit: Unit, reason: str, *, done: int) -> None:
        """Give up a checkpoint of whose prompts `done` are told already."""
        path = unit.checkpoint.path
        skipped = Skipped(path, reason, refused=path.is_dir())
        self.skipped[skipped.path] = skipped
        self.pass_over([skipped])
        self.telling.advance(len(unit.data.questions) - done, 0)

    def _release(self, lock: FileLock | None) -> None:
        if lock:
            lock.release()
            self._claims.discard(lock)

    def _say_done(self, unit: Unit, tokens: int, seconds: float) -> None:
        rate = f", {tokens / seconds:,.0f} tokens/s" if tokens and seconds else ""
        self.telling.say(f"{_name(unit)}: {counted(len(unit.data.questions), 'prompt')} in {seconds:.1f} s{rate}")

    def _events(self, unit: Unit, order: Order) -> Iterator[dict[str, Any]]:
        """Events of an order, from an engine that starts with its checkpoint where the one that is up asks for that."""
        while up := self._up:
            for event in up.engine.fulfil(order):
                if event["event"] == "restart":
                    self._stop_engine()
                    self._up = self._start(unit.checkpoint, up.architecture)
                    break
                yield event
            else:
                return

    def _engine_for(self, unit: Unit) -> None:
        """Have an engine up that is of the unit's architecture."""
        wanted = architecture(unit.checkpoint)
        if self._up is None or self._up.architecture != wanted:
            self._stop_engine()
            self._up = self._start(unit.checkpoint, wanted)

    def _start(self, checkpoint: Checkpoint, wanted: str) -> _Running:
        self.graders()
        with contextlib.ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flashrl-eval-")))
            job = Job(
                start=checkpoint.hf,
                quantized=checkpoint.quantized,
                work=work,
                data_sets=len(self.data),
                sampling=self.sampling,
                engine=self.engine,
            )
            for number, one in enumerate(self.data):
                job.write_questions(number, one.questions)
            engine = stack.enter_context(child.engine(job, self.log, self.devices))
            return _Running(wanted, engine, stack.pop_all())

    def _stop_engine(self) -> None:
        up, self._up = self._up, None
        if up:
            up.closing.close()


def architecture(checkpoint: Checkpoint) -> str:
    """What two checkpoints must share to run in one engine: config.json but for what saving it again changes.

    Quantized weights are loaded by the engine's start, each by an engine of its own. Raises Unreadable for a config that is gone.
    """
    config = read_json(checkpoint.hf / "config.json")
    alone = str(checkpoint.hf) if checkpoint.quantized else ""
    return json.dumps({**{k: v for k, v in config.items() if k not in _VOLATILE}, "": alone}, sort_keys=True)


def _name(unit: Unit) -> str:
    step = "" if unit.checkpoint.step is None else f" step {unit.checkpoint.step}"
    return f"{unit.checkpoint.run}{step}, {unit.data.name}"


def _names(units: Sequence[Unit]) -> str:
    return "; ".join(map(_name, units))


POLL_S = 5.0


def looks(patterns: Sequence[str], say: Callable[[str], None], *, poll_s: float = POLL_S) -> Iterator[bool]:
    """Now, and again as long as a run behind the patterns is training, and once when the last has ended.

    Yields whether it goes on after this look.
    """
    told: list[str] = []
    while True:
        running = [run.name for run in behind(patterns) if run.state == "running"]
        if running and running != told:
            say(f"watching {', '.join(running)}: each new checkpoint is evaluated; Ctrl-C ends that, not the training")
            told = running
        yield bool(running)
        if not running:
            return
        time.sleep(poll_s)


def behind(patterns: Sequence[str]) -> list[Run]:
    """Runs whose checkpoints the patterns name, or would name once there are some."""
    wanted = [str(paths.absolute(pattern)) for pattern in patterns]
    return [
        run for run in store.all_runs() if any(_names_checkpoints(pattern, run.paths.checkpoints) for pattern in wanted)
    ]


def _names_checkpoints(pattern: str, run_checkpoints: Path) -> bool:
    """Whether a glob or path names a run's checkpoints, or what is in or around that folder."""
    inside = run_checkpoints / step_name(0)
    literal = Path(pattern)
    if literal == run_checkpoints or run_checkpoints in literal.parents:
        return True
    return any(fnmatch.fnmatch(str(one), pattern) for one in (inside, *inside.parents))


_MOST_GRADERS = 8


@dataclass(frozen=True, slots=True)
class Finished:
    """A report, and the folder that it was written to."""

    report: Report
    folder: Path


def evaluate(request: Request, telling: Telling) -> Finished:
    """Evaluate what the request names, and write the report to its folder.

    Raises NothingMatched if no checkpoint could be read, RunFailed if an engine died.
    """
    with _opened(request, telling) as evaluation:
        return _look(request, evaluation)


def watch(
    lookup: Callable[[], Request], patterns: Sequence[str], telling: Telling, show: Callable[[Report], None]
) -> Finished:
    """Evaluate what is there and whatever the runs behind `patterns` save, until they end; `show` gets each new report.

    Raises what `evaluate` does, NothingMatched only once no run is left that could save something.
    """
    request: Request | None = None
    evaluation: Evaluation | None = None
    finished: Finished | None = None
    with contextlib.ExitStack() as stack:
        for goes_on in looks(patterns, telling.say):
            before = len(evaluation.results) if evaluation else 0
            try:
                asked = request.again() if request else lookup()
                if asked == request and goes_on:
                    continue
                request = asked
                evaluation = evaluation or stack.enter_context(_opened(request, telling))
                finished = _look(request, evaluation)
            except NothingMatched:
                if not goes_on and finished is None:
                    raise
            else:
                if goes_on and len(evaluation.results) > before:
                    show(finished.report)
    if finished is None:
        raise nothing(patterns, ())
    return finished


@contextlib.contextmanager
def _opened(request: Request, telling: Telling) -> Iterator[Evaluation]:
    """An evaluation, and nothing of its engine and graders running afterwards.

    Raises InputError for questions that nothing can grade, before anything is generated.
    """
    request.folder.mkdir(parents=True, exist_ok=True)
    engine, visible = devices.choose_devices(request.engine)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_log(request.folder))
        yield stack.enter_context(
            Evaluation(
                store=Store(request.units),
                data=request.data,
                sampling=request.sampling,
                engine=engine,
                log=log,
                graders=functools.cache(lambda: stack.enter_context(Graders(workers=_workers()))),
                telling=telling,
                devices=visible,
            )
        )


def _workers() -> int:
    """Graders are few: they work while responses are generated, and a response takes them less than a millisecond."""
    return max(1, min(_MOST_GRADERS, (os.cpu_count() or 1) // 2))


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[Path]:
    """An empty log file: engine.log, or one with the process's number if another evaluation writes that."""
    import filelock

    lock = filelock.FileLock(folder / ".engine.lock")
    try:
        with lock.acquire(timeout=0):
            log = folder / "engine.log"
            log.unlink(missing_ok=True)
            yield log
    except filelock.Timeout:
        yield folder / f"engine-{os.getpid()}.log"


def _look(request: Request, evaluation: Evaluation) -> Finished:
    started = time.perf_counter()
    found = list(units(request.checkpoints, request.data, sampling=request.sampling, engine=request.engine))
    present = [one for one in found if isinstance(one, Unit)]
    pruned = _pruned(request, evaluation.store, present)
    known = [*pruned, *present]
    gone = {parent for one in pruned for parent in one.checkpoint.hf.parents}
    passed = [one for one in request.skipped if one.path not in gone]
    passed += [one for one in found if isinstance(one, Skipped)]
    evaluation.pass_over(passed)
    evaluation.work([one for one in known if one.key not in evaluation.results])
    skipped = (*passed, *evaluation.skipped.values())
    # two checkpoints with the same weights have one result
    evaluated = [
        dataclasses.replace(evaluation.results[one.key], checkpoint=one.checkpoint, data=one.data)
        for one in known
        if one.key in evaluation.results
    ]
    if not evaluated:
        raise nothing(request.patterns, skipped)
    report = Report.of(
        evaluated,
        base=request.base,
        baseline=request.baseline,
        skipped=skipped,
        settings=request.settings(),
        seconds=round(time.perf_counter() - started, 2),
        fail_under=request.fail_under,
    )
    report.write(request.folder)
    return Finished(report, request.folder)


def _pruned(request: Request, store: Store, present: Sequence[Unit]) -> list[Unit]:
    """What was evaluated of steps that are there no more: training keeps the last few, their results keep the curve."""
    runs = {one.source: one.run for one in request.checkpoints}
    found = store.pruned((one.path for one in request.skipped), {one.asked: one.data for one in present})

    def labelled(one: Checkpoint) -> Checkpoint:
        return dataclasses.replace(one, run=runs.get(one.source, one.run))

    return [dataclasses.replace(one, checkpoint=labelled(one.checkpoint)) for one in found]

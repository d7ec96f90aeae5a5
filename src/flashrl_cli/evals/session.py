"""An evaluation from request to report: once, or as long as the runs behind it go on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.errors import NothingMatched
from flashrl_cli.evals import devices
from flashrl_cli.evals.pool import Graders
from flashrl_cli.evals.report import Report
from flashrl_cli.evals.run import Evaluation, Telling
from flashrl_cli.evals.store import Store, Unit, units
from flashrl_cli.evals.watch import looks
from flashrl_cli.runs.checkpoints import Skipped, nothing

if TYPE_CHECKING:
    from flashrl_cli.evals.request import Request
    from flashrl_cli.runs.checkpoints import Checkpoint

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
    engine, visible = devices.choose(request.engine)
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

"""An evaluation from request to report, once or repeatedly while the evaluated runs are training.

An engine for each architecture, or several on GPUs of their own, loads the weights of checkpoints in turn. Responses
are graded while the next ones are generated, and each result is stored as soon as it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

from flashrl_cli import paths
from flashrl_cli.contract import AUTO
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.evals import questions, rewards
from flashrl_cli.evals.accuracy import Report
from flashrl_cli.evals.cache import Cache, Unit, units
from flashrl_cli.evals.engines import Asked, Slot, architecture
from flashrl_cli.evals.graders import Graders
from flashrl_cli.evals.job import EngineSettings, Order, Sampling
from flashrl_cli.evals.questions import UNCHANGED, Prompting
from flashrl_cli.evals.results import Evaluated
from flashrl_cli.machine import gpus
from flashrl_cli.precision import SMOOTHED
from flashrl_cli.runs import store
from flashrl_cli.runs.checkpoints import EVAL_FOLDER, Checkpoint, Skipped, find, hf_folder, nothing
from flashrl_cli.text import counted
from flashrl_cli.verl.checkpoints import step_name
from flashrl_cli.weights import Unreadable, read_json
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    from flashrl_cli.evals.questions import DataSet
    from flashrl_cli.runs.store import Run

POLL_S = 5.0
"""Seconds between two searches for new checkpoints while runs are watched."""
_MOST_GRADERS = 8
_CACHE = "results"
"""Folder of an evaluation that stores each checkpoint's graded responses."""
_OWN_ARGUMENTS = frozenset({
    "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""Parameters of Transformers' `apply_chat_template` that are no variables of a template."""
_TEMPLATES = ("chat_template*", "tokenizer_config.json", "additional_chat_templates/*")
"""Files of an HF folder that hold chat templates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A complete description of an evaluation: checkpoints (including `base` and `baseline`), questions, settings.

    `base` is the policy that the runs began with, `baseline` a model that the best step is compared with. `skipped` are
    folders that the patterns name but that hold no checkpoint. `folder` receives the results and the engine's log.
    `engines` is the number of engines that share the work, None for as many as the GPUs have room for. `fail_under` is
    the accuracy that must be reached (verdicts.Threshold).
    """

    patterns: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    base: Checkpoint | None
    baseline: Checkpoint | None
    skipped: tuple[Skipped, ...]
    data: tuple[DataSet, ...]
    sampling: Sampling
    engine: EngineSettings
    folder: Path
    prompting: Prompting = UNCHANGED
    engines: int | None = 1
    fail_under: float | None = None

    @classmethod
    def find(
        cls,
        patterns: Sequence[str],
        *,
        base: str | None,
        baseline: str | None,
        dataset: str | None,
        limit: int | None,
        sampling: Sampling,
        engine: EngineSettings,
        out: Path | None,
        prompting: Prompting = UNCHANGED,
        engines: int | None = 1,
        reward: str | None = None,
        threshold: float | None = None,
        fail_under: float | None = None,
    ) -> Request:
        """Look up checkpoints and questions. Raises InputError or NothingMatched for missing ones."""
        found = find(patterns)
        start, other = (hf_folder(path) if path else None for path in (base, baseline))
        runs = list(dict.fromkeys(c.source for c in found.checkpoints if c.step is not None))
        checkpoints = _together(found.checkpoints, start, other)
        check_profile(engine, [one.hf for one in checkpoints])
        check_arguments(prompting, [one.hf for one in checkpoints])
        data = questions.choose_questions(
            dataset,
            runs,
            limit,
            prompting=prompting,
            seed=sampling.seed,
            own=rewards.chosen(reward, threshold, runs),
        )
        rewards.check(data)
        return cls(
            patterns=tuple(patterns),
            checkpoints=checkpoints,
            base=start,
            baseline=other,
            skipped=found.skipped,
            data=data,
            sampling=sampling,
            prompting=prompting,
            engine=engine,
            folder=paths.absolute(out) if out else _place(found.checkpoints),
            engines=engines,
            fail_under=fail_under,
        )

    def again(self) -> Request:
        """The request with the checkpoints that its patterns match now. Raises NothingMatched if there are none."""
        found = find(self.patterns)
        checkpoints = _together(found.checkpoints, self.base, self.baseline)
        return dataclasses.replace(self, checkpoints=checkpoints, skipped=found.skipped)

    @property
    def prompts(self) -> int:
        """Number of prompts to answer, over all checkpoints."""
        return len(self.checkpoints) * sum(len(one.questions) for one in self.data)

    def settings(self) -> dict[str, Any]:
        """Settings for the report, as plain data."""
        engine = {name: getattr(self.engine, name) for name in ("rollout", "profile", "rotation")}
        own = {question.reward.label for one in self.data for question in one.questions if question.reward}
        asked = {"sampling": asdict(self.sampling), "prompting": asdict(self.prompting)}
        return {**asked, **engine, "rewards": sorted(own)}


def check_profile(engine: EngineSettings, folders: Iterable[Path]) -> None:
    """Raise InputError unless the engine's smoothing profile, if any, can be applied to the models in `folders`."""
    if engine.profile is None:
        return
    if engine.rollout not in SMOOTHED:
        raise InputError(
            f"--profile smooths what a quantized rollout loses, and {engine.rollout} loses nothing",
            hint=f"--rollout {SMOOTHED[0]}",
        )
    try:
        profile = Profile.read(Path(engine.profile))
    except Unreadable as error:
        raise InputError(str(error), hint="`flashrl quantize MODEL --calibrate PARQUET` makes one") from None
    without = "evaluate it without --profile"
    if engine.rotation not in {AUTO, 0}:
        what = f"--rotation {engine.rotation} mixes the channels for which {engine.profile} was made"
        raise InputError(what, hint=f"--rotation off, or {without}")
    for folder in folders:
        try:
            config = read_json(folder / "config.json")
        except Unreadable:
            continue  # this checkpoint is skipped later, with the reason
        if "quantization_config" in config:
            raise InputError(f"{folder} is quantized already and takes no profile", hint=without)
        if unlike := profile.suits(config):
            raise InputError(f"{engine.profile} is of another model than {folder}: {unlike}", hint=without)


def check_arguments(prompting: Prompting, folders: Iterable[Path]) -> None:
    """Raise InputError for an argument that no chat template in `folders` mentions: it would change nothing."""
    if not prompting.arguments:
        return
    if prompting.chat_template is None:
        files = [file for folder in folders for name in _TEMPLATES for file in folder.glob(name)]
        # in tokenizer_config.json a template is a JSON string, with \n before a name that begins a line
        templates = " ".join(file.read_text(encoding="utf-8", errors="replace").replace(r"\n", " ") for file in files)
    else:
        templates = prompting.chat_template
    for name in prompting.arguments:
        if name in _OWN_ARGUMENTS:
            raise InputError(f"--template-arg {name} is not for the template, and is set here already")
        if not re.search(rf"\b{re.escape(name)}\b", templates):
            raise InputError(
                f"--template-arg {name}: no chat template of these models mentions it",
                hint="in Qwen3's it is enable_thinking; chat_template.jinja shows what others there are",
            )


def _together(
    found: Iterable[Checkpoint], base: Checkpoint | None, baseline: Checkpoint | None
) -> tuple[Checkpoint, ...]:
    """Base, baseline and the checkpoints found, without duplicates."""
    extra = [one for one in (base, baseline) if one]
    return tuple({one.path: one for one in (*extra, *found)}.values())


def _place(checkpoints: Iterable[Checkpoint]) -> Path:
    """The folder `eval/` in the only run, in the only project of the runs, or else in the working folder."""
    sources = {c.source for c in checkpoints if c.step is not None}
    projects = {source.parent for source in sources}
    root = sources.pop() if len(sources) == 1 else projects.pop() if len(projects) == 1 else Path.cwd()
    return root / EVAL_FOLDER


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How an evaluation reports: `say` prints a sentence, `advance` counts further prompts and tokens."""

    say: Callable[[str], None]
    advance: Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Finished:
    """A report, and the folder that it was written to."""

    report: Report
    folder: Path


def evaluate(request: Request, progress: Progress) -> Finished:
    """Evaluate the checkpoints of the request, and write the report to its folder.

    Raises NothingMatched if no checkpoint could be read, RunFailed if an engine died.
    """
    with Evaluation(request, progress) as evaluation:
        return evaluation.report(request)


def watch(
    lookup: Callable[[], Request], patterns: Sequence[str], progress: Progress, show: Callable[[Report], None]
) -> Finished:
    """Evaluate existing checkpoints and those that the runs of `patterns` still save, until these runs end.

    `show` receives each new report. Raises the errors of `evaluate`, but NothingMatched only once no run is left that
    could save a checkpoint.
    """
    request: Request | None = None
    evaluation: Evaluation | None = None
    finished: Finished | None = None
    with contextlib.ExitStack() as stack:
        for training in looks(patterns, progress.say):
            try:
                newest = request.again() if request else lookup()
                if training and newest == request:
                    continue
                request = newest
                evaluation = evaluation or stack.enter_context(Evaluation(request, progress))
                known = len(evaluation.results)
                finished = evaluation.report(request)
                if training and len(evaluation.results) > known:
                    show(finished.report)
            except NothingMatched:
                # while a run is training, the next search may find a checkpoint
                if not training and finished is None:
                    raise
    if finished is None:
        raise nothing(patterns, ())
    return finished


def looks(patterns: Sequence[str], say: Callable[[str], None], *, poll_s: float = POLL_S) -> Iterator[bool]:
    """Yield now, repeatedly while a run of the patterns is training, and once after the last one has ended.

    Each value says whether a run is training, that is, whether another search will follow.
    """
    announced: list[str] = []
    while True:
        running = [run.name for run in behind(patterns) if run.state == "running"]
        if running and running != announced:
            say(f"watching {', '.join(running)}: each new checkpoint is evaluated; Ctrl-C ends that, not the training")
            announced = running
        yield bool(running)
        if not running:
            return
        time.sleep(poll_s)


def behind(patterns: Sequence[str]) -> list[Run]:
    """Runs whose checkpoints the patterns match, or would match once there are some."""
    wanted = [str(paths.absolute(pattern)) for pattern in patterns]
    return [run for run in store.all_runs() if any(names_checkpoints(one, run.paths.checkpoints) for one in wanted)]


def names_checkpoints(pattern: str, run_checkpoints: Path) -> bool:
    """Whether a glob or path names a run's checkpoint folder, or something inside or around that folder."""
    inside = run_checkpoints / step_name(0)
    literal = Path(pattern)
    if literal == run_checkpoints or run_checkpoints in literal.parents:
        return True
    return any(fnmatch.fnmatch(str(one), pattern) for one in (inside, *inside.parents))


@dataclass(slots=True)
class _Answering:
    """A claimed unit that engines are answering: `shares` are the questions for each slot, None for nothing.

    `left` counts the shares that are not finished, `done` the prompts that were reported; `seconds` is the time of the
    slowest share. `holds` is the handshake of the first engine that loaded the weights.
    """

    unit: Unit
    architecture: str
    shares: list[tuple[int, ...] | None]
    left: int
    done: int
    tokens: int = 0
    seconds: float = 0.0
    holds: dict[str, Any] = field(default_factory=dict)


class Evaluation:
    """Engines and graders that keep running from checkpoint to checkpoint; leaving this context ends them.

    They start when they are first needed. `results` (by a unit's key) and `skipped` (by a checkpoint's path) grow as
    units are finished.
    """

    def __init__(self, request: Request, progress: Progress) -> None:
        """Prepare for `request` and for requests that differ from it only in their checkpoints."""
        self.results: dict[str, Evaluated] = {}
        self.skipped: dict[Path, Skipped] = {}
        self._request, self._progress = request, progress
        self._cache = Cache(request.folder / _CACHE)
        self._closing = contextlib.ExitStack()
        self._warned: set[Path] = set()
        self._slots: list[Slot] = []
        self._reports: SimpleQueue[tuple[Slot, Unit, dict[str, Any] | Future[None]]] = SimpleQueue()
        self._graders: Graders | None = None
        self._thread = ThreadPoolExecutor(1)
        self._grading: list[Future[None]] = []

    def __enter__(self) -> Self:
        """Choose GPUs and open the log. Raises EnvironmentNotReady if no GPU has room for an engine."""
        request, engine = self._request, self._request.engine
        request.folder.mkdir(parents=True, exist_ok=True)
        places = gpus.places(request.engines, engine.tensor_parallel, engine.gpu_memory_utilization)
        log = self._closing.enter_context(_log(request.folder))
        self._closing.callback(self._cache.release_all)
        self._closing.callback(self._thread.shutdown, wait=False, cancel_futures=True)
        asked = Asked(data=request.data, sampling=request.sampling, prompting=request.prompting)
        for number, (devices, share) in enumerate(places):
            slot = Slot(
                number,
                asked,
                settings=dataclasses.replace(engine, gpu_memory_utilization=share),
                devices=devices,
                log=log.with_name(f"{log.stem}.{number + 1}{log.suffix}") if number else log,
                reports=self._reports,
            )
            self._slots.append(slot)
            self._closing.callback(slot.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def report(self, request: Request) -> Finished:
        """Evaluate the remaining checkpoints of the request, and write the report of all of them.

        Raises NothingMatched if no checkpoint could be read, RunFailed if an engine died.
        """
        started = time.perf_counter()
        found = list(
            units(
                request.checkpoints,
                request.data,
                sampling=request.sampling,
                prompting=request.prompting,
                engine=request.engine,
            )
        )
        present = [one for one in found if isinstance(one, Unit)]
        pruned = self._pruned(request, present)
        gone = {parent for one in pruned for parent in one.checkpoint.hf.parents}
        skipped = [one for one in request.skipped if one.path not in gone]
        skipped += [one for one in found if isinstance(one, Skipped)]
        for one in skipped:
            self._warn(one)
        wanted = [*pruned, *present]
        self.work([one for one in wanted if one.key not in self.results])
        skipped += self.skipped.values()
        # two checkpoints with the same weights share one result
        evaluated = [
            dataclasses.replace(self.results[one.key], checkpoint=one.checkpoint, data=one.data)
            for one in wanted
            if one.key in self.results
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

    def work(self, units: Iterable[Unit]) -> None:
        """Finish `units`: stored results are reused, and units that another evaluation works on come last.

        Raises RunFailed if an engine died.
        """
        different = {unit.key: unit for unit in units}.values()
        elsewhere = self._answer([unit for unit in different if not self._reuse(unit)])
        if elsewhere:
            self._progress.say(f"waiting for another evaluation: {'; '.join(map(_name, elsewhere))}")
        for unit in elsewhere:
            if not self._reuse(unit):
                self._answer([unit], wait=True)
        for future in self._grading:
            future.result()
        self._grading.clear()

    def _pruned(self, request: Request, present: Sequence[Unit]) -> list[Unit]:
        """Results of steps that training has removed since they were evaluated; they keep the curve complete."""
        runs = {one.source: one.run for one in request.checkpoints}
        found = self._cache.pruned((one.path for one in request.skipped), {one.asked: one.data for one in present})

        def labelled(one: Checkpoint) -> Checkpoint:
            return dataclasses.replace(one, run=runs.get(one.source, one.run))

        return [dataclasses.replace(one, checkpoint=labelled(one.checkpoint)) for one in found]

    def _reuse(self, unit: Unit) -> bool:
        """Reuse the stored result of a unit, if there is one. Returns whether the unit is finished."""
        if unit.checkpoint.path not in self.skipped:
            kept = self._cache.load(unit)
            if kept is None:
                return False
            self.results[unit.key] = kept
        self._progress.advance(len(unit.data.questions), 0)
        return True

    def _answer(self, units: Sequence[Unit], *, wait: bool = False) -> list[Unit]:
        """Get the answers to `units`, of which every engine answers a share; returns those that it did not get.

        Another evaluation works on these; with `wait` they are waited for instead. No engine waits for another one: it
        goes on with its share of the next unit.
        """
        begun: dict[str, _Answering | None] = {}
        elsewhere: list[Unit] = []

        def feed(slot: Slot) -> bool:
            for unit in queues[slot]:
                if unit.key not in begun and (wait or self._cache.claim(unit)):
                    begun[unit.key] = self._begin(unit, wait=wait)
                elif unit.key not in begun:
                    begun[unit.key] = None
                    elsewhere.append(unit)
                if (one := begun[unit.key]) and self._give(slot, one):
                    return True
            return False

        queues = {slot: iter(units) for slot in self._slots}
        busy = sum(feed(slot) for slot in self._slots)
        while busy:
            slot, unit, event = self._reports.get()
            if isinstance(event, Future):
                event.result()
                busy += feed(slot) - 1
            elif (one := begun[unit.key]) and unit.checkpoint.path not in self.skipped:
                self._note(slot, one, event)
        return elsewhere

    def _begin(self, unit: Unit, *, wait: bool) -> _Answering | None:
        """Divide what is left of a claimed unit among the engines; None if nothing is, or it cannot be answered."""
        if wait:
            self._cache.claim(unit, wait=True)
        if self._reuse(unit):  # another evaluation may have finished it meanwhile
            self._cache.release(unit)
            return None
        answered = self._cache.answered(unit)
        self._progress.advance(len(answered), 0)
        try:
            wanted = architecture(unit.checkpoint)
            if not any(slot.can_load(wanted) for slot in self._slots):
                # an engine would find the same problem after half a minute of starting
                unit.checkpoint.weights.accounted()
        except (Unreadable, OSError) as error:  # a training run may have removed it meanwhile
            self._skip(unit, str(error), done=len(answered))
            return None
        self._start_graders()
        left = [number for number in range(len(unit.data.questions)) if number not in answered]
        shares = [tuple(left[slot.number :: len(self._slots)]) for slot in self._slots]
        # the first engine also reports what it holds
        given = [share if share or not number else None for number, share in enumerate(shares)]
        count = sum(share is not None for share in given)
        return _Answering(unit=unit, architecture=wanted, shares=given, left=count, done=len(answered))

    def _give(self, slot: Slot, one: _Answering) -> bool:
        """Give an engine its share of a unit, if it has one."""
        unit, share = one.unit, one.shares[slot.number]
        if share is None or unit.checkpoint.path in self.skipped:
            return False
        order = Order(
            weights=unit.checkpoint.weights,
            data=self._request.data.index(unit.data),
            answers=self._cache.answers(unit, slot.number),
            questions=share,
        )
        slot.give(unit, order, one.architecture)
        return True

    def _note(self, slot: Slot, one: _Answering, event: dict[str, Any]) -> None:
        """Report an event of an engine about a unit; a thread grades the unit after the last share."""
        unit = one.unit
        match event["event"]:
            case "stage":
                which = f"engine {slot.number + 1} of {len(self._slots)}: " if len(self._slots) > 1 else ""
                self._progress.say(f"{which}{event['text']}")
            case "loaded":
                one.holds = one.holds or event["holds"]
            case "advance":
                one.done, one.tokens = one.done + event["prompts"], one.tokens + event["tokens"]
                self._progress.advance(event["prompts"], event["tokens"])
            case "skipped":
                self._skip(unit, event["reason"], done=one.done)
            case "done":
                one.left, one.seconds = one.left - 1, max(one.seconds, event["seconds"])
                if not one.left:
                    rate = f", {one.tokens / one.seconds:,.0f} tokens/s" if one.tokens and one.seconds else ""
                    prompts = counted(len(unit.data.questions), "prompt")
                    self._progress.say(f"{_name(unit)}: {prompts} in {one.seconds:.1f} s{rate}")
                    self._grading.append(self._thread.submit(self._grade, unit, one.holds, one.seconds))

    def _grade(self, unit: Unit, holds: dict[str, Any], seconds: float) -> None:
        """Grade the answers and store the result (in a separate thread, while the engine continues)."""
        found = self._cache.answered(unit)
        responses = tuple(sample for number in sorted(found) for sample in found[number])
        grades = tuple(self._start_graders().grade(unit.data.questions, responses))
        evaluated = Evaluated(
            checkpoint=unit.checkpoint, data=unit.data, responses=responses, grades=grades, holds=holds, seconds=seconds
        )
        self._cache.save(unit, evaluated)
        self.results[unit.key] = evaluated
        self._cache.release(unit)

    def _skip(self, unit: Unit, reason: str, *, done: int) -> None:
        """Give up a claimed unit's checkpoint; `done` of the unit's prompts have been reported already."""
        path = unit.checkpoint.path
        self.skipped[path] = Skipped(path, reason, refused=path.is_dir())
        self._warn(self.skipped[path])
        self._progress.advance(len(unit.data.questions) - done, 0)
        self._cache.release(unit)

    def _warn(self, skipped: Skipped) -> None:
        """Report once, and as soon as it is known, what is not evaluated: the rest may take hours."""
        if skipped.path not in self._warned:
            self._warned.add(skipped.path)
            self._progress.say(f"warning: skipped {skipped.path}: {skipped.reason}")

    def _start_graders(self) -> Graders:
        """The graders; the first call starts them."""
        if self._graders is None:
            # few are enough: grading a response takes less than a millisecond
            workers = max(1, min(_MOST_GRADERS, (os.cpu_count() or 1) // 2))
            self._graders = self._closing.enter_context(Graders(workers=workers))
        return self._graders


def _name(unit: Unit) -> str:
    step = "" if unit.checkpoint.step is None else f" step {unit.checkpoint.step}"
    return f"{unit.checkpoint.run}{step}, {unit.data.name}"


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[Path]:
    """An empty log file: engine.log, or one named after the process if another evaluation writes that."""
    import filelock

    lock = filelock.FileLock(folder / ".engine.lock")
    try:
        with lock.acquire(timeout=0):
            log = folder / "engine.log"
            log.unlink(missing_ok=True)
            yield log
    except filelock.Timeout:
        yield folder / f"engine-{os.getpid()}.log"

"""An evaluation from request to report, once and as long as runs are training, with a scripted engine."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import paths
from flashrl_cli.errors import InputError, NothingMatched, RunFailed
from flashrl_cli.evals import evaluation, results
from flashrl_cli.evals.accuracy import Report
from flashrl_cli.evals.cache import Cache, Unit, units
from flashrl_cli.evals.engines import architecture
from flashrl_cli.evals.evaluation import Evaluation, Finished, Request, check_arguments, check_profile, evaluate, watch
from flashrl_cli.evals.job import EngineSettings, Job, Order, Sampling
from flashrl_cli.evals.questions import DataSet, Prompting
from flashrl_cli.runs import store
from flashrl_cli.runs.checkpoints import Checkpoint, Skipped
from flashrl_cli.runs.store import Run as RunOnDisk
from flashrl_cli.weights import accounting
from tests import sample_rows
from tests.saved_files import saved_profile
from tests.unit.evals.lab import (
    ENGINE,
    PROMPTING,
    SAMPLING,
    Engines,
    Graders,
    Reported,
    answer,
    checkpoint,
    data,
    evaluated,
    response,
    scripted,
)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    return scripted(monkeypatch)


def asked(folder: Path, *checkpoints: Checkpoint, sets: tuple[DataSet, ...] | None = None) -> Request:
    return Request(
        patterns=("x",),
        checkpoints=checkpoints,
        base=None,
        baseline=None,
        skipped=(),
        data=sets or (data(),),
        sampling=SAMPLING,
        prompting=PROMPTING,
        engine=ENGINE,
        folder=folder / "eval",
    )


def work(request: Request) -> tuple[Finished, Evaluation, Reported]:
    reported = Reported()
    with Evaluation(request, reported.progress) as one:
        return one.report(request), one, reported


def units_of(request: Request) -> list[Unit]:
    found = units(
        request.checkpoints, request.data, sampling=request.sampling, prompting=PROMPTING, engine=request.engine
    )
    return [one for one in found if isinstance(one, Unit)]


def assert_unclaimed(request: Request, unit: Unit) -> None:
    cache = Cache(request.folder / "results")
    assert cache.claim(unit)
    cache.release_all()


def test_one_engine_for_each_architecture_and_everything_is_ended(tmp_path: Path, engines: Engines) -> None:
    checkpoints = [checkpoint(tmp_path, 1), checkpoint(tmp_path, 2), checkpoint(tmp_path, 3, hidden_size=16)]
    request = asked(tmp_path, *checkpoints, sets=(data("sums", 3), data("products", 2)))
    finished, done, reported = work(request)
    assert [order.weights.hf.name for order in engines.orders] == ["1", "1", "2", "2", "3", "3"], "loaded once each"
    assert len(engines.jobs) == 2
    assert (engines.up, Graders.started, Graders.up) == (0, 1, 0)
    texts = [[r.response for r in done.results[one.key].responses] for one in units_of(request)]
    assert (texts[0], texts[5]) == (["1: 0", "1: 1", "1: 2"], ["3: 0", "3: 1"])
    assert (reported.prompts, reported.tokens) == (3 * 5, 3 * 15)
    document = json.loads((finished.folder / "eval.json").read_text())
    assert [row["step"] for row in document["results"]] == [1, 1, 2, 2, 3, 3]
    assert (document["rollout"], document["sampling"]["temperature"]) == ("bf16", 0.0)
    assert (finished.folder / "eval.csv").is_file()
    assert (finished.folder / "responses.parquet").is_file()


def test_nothing_is_generated_twice(tmp_path: Path, engines: Engines) -> None:
    first, _, _ = work(asked(tmp_path, checkpoint(tmp_path, 1)))
    again, _, _ = work(asked(tmp_path, *(row.checkpoint for row in results_of(first))))
    assert again.report.rows == first.report.rows
    assert (len(engines.jobs), Graders.started) == (1, 1), "without anything new nothing starts"
    both, _, reported = work(asked(tmp_path, results_of(first)[0].checkpoint, checkpoint(tmp_path, 2)))
    assert [order.weights.hf.name for order in engines.orders] == ["1", "2"]
    assert both.report.rows[0] == first.report.rows[0]
    assert reported.prompts == 6


def results_of(finished: Finished) -> list[results.Evaluated]:
    return [entry.result for entry in finished.report.entries]


def test_killed_in_the_middle_it_goes_on(tmp_path: Path, engines: Engines) -> None:
    request = asked(tmp_path, checkpoint(tmp_path, 1))
    (unit,) = units_of(request)
    file = Cache(request.folder / "results").answers(unit)
    file.parent.mkdir(parents=True)
    results.append(file, [response(1, "before")])
    file.write_text(file.read_text() + '[{"question": 2, "sam')
    _, done, reported = work(request)
    assert engines.orders[0].questions == (0, 2)
    assert [r.response for r in done.results[unit.key].responses] == ["1: 0", "before", "1: 2"]
    assert (reported.prompts, reported.tokens) == (3, 6)


@pytest.mark.parametrize(("spoilt", "started"), [(False, 1), (True, 2)])
def test_what_an_engine_cannot_read_is_skipped_with_all_its_data_sets(
    spoilt: bool, started: int, tmp_path: Path, engines: Engines
) -> None:
    """An engine that was spoilt is replaced."""

    def refuse_first(job: Job, order: Order) -> Any:
        if order.weights.hf.name == "1":
            yield {"event": "advance", "prompts": 1, "tokens": 3}
            yield {"event": "skipped", "reason": "torn", "ends": spoilt}
        else:
            yield from answer(job, order)

    engines.script = refuse_first
    request = asked(
        tmp_path, checkpoint(tmp_path, 1), checkpoint(tmp_path, 2), sets=(data("sums", 3), data("products", 2))
    )
    finished, _, reported = work(request)
    assert [(one.reason, one.refused) for one in finished.report.skipped] == [("torn", True)]
    assert [(row.step, row.dataset) for row in finished.report.rows] == [(2, "sums"), (2, "products")]
    assert reported.prompts == 10
    assert len(engines.jobs) == started


def test_an_engine_that_a_checkpoint_has_outgrown_is_replaced(tmp_path: Path, engines: Engines) -> None:
    def only_at_the_start(job: Job, order: Order) -> Any:
        if order.weights.hf.name == "2" and job.start.name != "2":
            yield {"event": "restart"}
        else:
            yield from answer(job, order)

    engines.script = only_at_the_start
    checkpoints = [checkpoint(tmp_path, step) for step in (1, 2, 3)]
    finished, _, reported = work(asked(tmp_path, *checkpoints, sets=(data("sums", 3), data("products", 2))))
    assert [job.start.name for job in engines.jobs] == ["1", "2"]
    assert len(finished.report.rows) == 6
    assert not finished.report.skipped
    assert reported.prompts == 15


def test_several_engines_share_every_unit(tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loads every checkpoint once and answers its part; together they answer everything once."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    checkpoints = [checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)]
    request = asked(tmp_path, *checkpoints, sets=(data("sums", 7), data("products", 2)))
    finished, done, reported = work(dataclasses.replace(request, engines=None))
    assert sorted(map(str, engines.devices)) == ["4", "5", "6"]
    given = [(o.weights.hf.name, o.data, o.questions) for o in engines.orders]
    assert sorted(given) == [
        (name, number, share)
        for name in ("1", "2")
        for number, shares in ((0, ((0, 3, 6), (1, 4), (2, 5))), (1, ((0,), (1,))))
        for share in shares
    ]
    texts = [[r.response for r in done.results[one.key].responses] for one in units_of(request)]
    assert texts[0] == [f"1: {number}" for number in range(7)]
    assert texts[3] == ["2: 0", "2: 1"]
    assert (reported.prompts, reported.tokens, engines.up) == (18, 54, 0)
    assert sum("prompts in" in text for text in reported.said) == 4, "each unit is reported once"
    assert not list((finished.folder / "results").glob("*.jsonl"))
    again, _, _ = work(request)
    assert again.report.rows == finished.report.rows
    assert len(engines.jobs) == 3, "one engine finds what three have done"


def test_what_several_engines_left_one_goes_on_with(
    tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def dies(job: Job, order: Order) -> Iterator[dict[str, Any]]:
        results.append(order.answers, [response(order.questions[0], "before")])
        yield {"event": "advance", "prompts": 1, "tokens": 3}
        raise RunFailed("the evaluation engine died")

    engines.script = dies
    request = asked(tmp_path, checkpoint(tmp_path, 1), sets=(data("sums", 6),))
    with pytest.raises(RunFailed, match="the evaluation engine died"):
        work(dataclasses.replace(request, engines=2))
    assert engines.up == 0
    kept = len(list((request.folder / "results").glob("*.jsonl")))
    engines.script = answer
    _, done, reported = work(request)
    (unit,) = units_of(request)
    assert len(engines.orders[-1].questions) == 6 - kept
    found = [r.response for r in done.results[unit.key].responses]
    assert found == [f"1: {n}" if n in engines.orders[-1].questions else "before" for n in range(6)]
    assert reported.prompts == 6


@pytest.mark.parametrize("spoilt", [False, True])
def test_what_one_of_several_engines_cannot_read_is_skipped_once(
    spoilt: bool, tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def refuse_first(job: Job, order: Order) -> Iterator[dict[str, Any]]:
        if order.weights.hf.name == "1":
            yield {"event": "skipped", "reason": "torn", "ends": spoilt}
        else:
            yield from answer(job, order)

    engines.script = refuse_first
    request = asked(tmp_path, checkpoint(tmp_path, 1), checkpoint(tmp_path, 2), sets=(data("sums", 5), data("more", 4)))
    finished, _, reported = work(dataclasses.replace(request, engines=2))
    assert [(one.reason, one.refused) for one in finished.report.skipped] == [("torn", True)]
    assert [(row.step, row.dataset, row.n) for row in finished.report.rows] == [(2, "sums", 5), (2, "more", 4)]
    assert reported.prompts == 18
    assert sum("skipped" in text for text in reported.said) == 1
    assert engines.up == 0


def test_a_prompt_argument_that_no_template_has_is_refused(tmp_path: Path) -> None:
    one, other = checkpoint(tmp_path, 1).hf, checkpoint(tmp_path, 2).hf
    (other / "chat_template.jinja").write_text("{% if enable_thinking %}")
    (one / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{\ndate_string }}"}))
    for name in ("enable_thinking", "date_string"):
        check_arguments(Prompting(arguments={name: 1}), [one, other])
    for how in ({"enable_think": 1}, {"tokenize": False}):
        with pytest.raises(InputError, match="--template-arg"):
            check_arguments(Prompting(arguments=how), [one, other])
    check_arguments(Prompting(chat_template="{{ mine }}", arguments={"mine": 1}), [one])
    for template in ("{{ yours }}", ""):
        with pytest.raises(InputError, match="no chat template of these models mentions it"):
            check_arguments(Prompting(chat_template=template, arguments={"mine": 1}), [one, other])


def test_what_training_removed_meanwhile_is_skipped(tmp_path: Path, engines: Engines) -> None:
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    request, reported = asked(tmp_path, first, second), Reported()
    wanted = units_of(request)
    shutil.rmtree(first.hf)
    with Evaluation(request, reported.progress) as one:
        one.work(wanted)
    assert list(one.skipped) == [first.path]
    assert not one.skipped[first.path].refused
    assert set(one.results) == {wanted[1].key}
    assert reported.prompts == 6
    assert_unclaimed(request, wanted[0])


def test_weights_that_no_engine_would_take_are_refused_before_one_starts(
    tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = accounting.Expected(
        forms=({"w": (1,), "v": (1,)},), optional=frozenset(), ignored=(), integers=frozenset()
    )
    monkeypatch.setattr(accounting, "_of_config", lambda text: expected)
    with pytest.raises(NothingMatched, match="missing 1 tensor: v"):
        work(asked(tmp_path, checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)))
    assert not engines.jobs


def test_what_is_torn_is_reported_and_the_rest_goes_on(tmp_path: Path, engines: Engines) -> None:
    torn = checkpoint(tmp_path, 1)
    (torn.hf / "model.safetensors").write_bytes(b"x" * 20)
    request, reported = asked(tmp_path, torn, checkpoint(tmp_path, 2)), Reported()
    with Evaluation(request, reported.progress) as one:
        finished = [one.report(request) for _ in range(2)][1]
    assert [skipped.path for skipped in finished.report.skipped] == [torn.hf]
    assert [row.step for row in finished.report.rows] == [2]
    assert [text.startswith(f"warning: skipped {torn.hf}: ") for text in reported.said] == [True, False], "once"
    with pytest.raises(NothingMatched, match=r"model\.safetensors"):
        evaluate(asked(tmp_path, torn), Reported().progress)


def test_architectures(tmp_path: Path) -> None:
    """Saving again makes no other one; a quantized checkpoint has one of its own."""
    first = checkpoint(tmp_path, 1, dtype="bfloat16", transformers_version="5.9", eos_token_id=2)
    again = checkpoint(tmp_path, 2, dtype="float32", transformers_version="5.10", eos_token_id=[2, 3])
    assert architecture(first) == architecture(again)
    quantized = (
        dataclasses.replace(checkpoint(tmp_path / "q", step, eos_token_id=2), quantized="compressed-tensors")
        for step in (1, 2)
    )
    different = [first, checkpoint(tmp_path, 3, num_hidden_layers=3), *quantized]
    assert len({architecture(one) for one in different}) == 4


@pytest.mark.parametrize(("finishes", "ours"), [(True, ["2"]), (False, ["2", "1"])])
def test_two_at_once_share_the_work(finishes: bool, ours: list[str], tmp_path: Path, engines: Engines) -> None:
    """What another evaluation holds comes last, and is taken from it when it is finished, or done if it gives up."""
    request = asked(tmp_path, checkpoint(tmp_path, 1), checkpoint(tmp_path, 2))
    held, _ = units_of(request)
    reported, claimed = Reported(), threading.Event()

    def finish_elsewhere() -> None:
        cache = Cache(request.folder / "results")
        cache.claim(held)
        claimed.set()
        while not any("waiting for another evaluation: a step 1, sums" in text for text in reported.said):
            time.sleep(0.01)
        if finishes:
            cache.save(held, evaluated(held.checkpoint, held.data))
        cache.release(held)

    thread = threading.Thread(target=finish_elsewhere)
    thread.start()
    assert claimed.wait(60)
    with Evaluation(request, reported.progress) as one:
        one.report(request)
    thread.join()
    assert [order.weights.hf.name for order in engines.orders] == ours
    assert len(one.results) == 2


def test_the_same_weights_are_evaluated_once_and_shown_under_both_names(tmp_path: Path, engines: Engines) -> None:
    one = checkpoint(tmp_path, 1)
    finished, _, _ = work(asked(tmp_path, one, dataclasses.replace(one, step=None, run="b", source=one.hf)))
    assert [(row.run, row.step) for row in finished.report.rows] == [("a", 1), ("b", None)]
    assert len(engines.orders) == 1


def test_after_an_interrupt_nothing_is_up_or_claimed(tmp_path: Path, engines: Engines) -> None:
    def interrupted(job: Job, order: Order) -> Any:
        raise KeyboardInterrupt
        yield

    engines.script = interrupted
    request = asked(tmp_path, checkpoint(tmp_path, 1))
    one = Evaluation(request, Reported().progress)
    with pytest.raises(KeyboardInterrupt), one:
        one.report(request)
    assert (engines.up, Graders.up) == (0, 0)
    assert_unclaimed(request, units_of(request)[0])


def test_a_grader_that_fails_is_heard(tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no grade")

    monkeypatch.setattr(Graders, "grade", fail)
    with pytest.raises(ValueError, match="no grade"):
        work(asked(tmp_path, checkpoint(tmp_path, 1)))


def test_results_outlive_their_checkpoints(tmp_path: Path, engines: Engines) -> None:
    """verl removes `actor/` of old steps and leaves their folders.

    Results of other questions or of a folder not asked for do not count.
    """
    run = tmp_path / "run"
    old, new = (
        dataclasses.replace(checkpoint(run / f"global_step_{step}" / "actor", step), source=run) for step in (1, 2)
    )
    work(asked(tmp_path, old))
    work(asked(tmp_path, old, sets=(data("products"),)))
    unread = dataclasses.replace(asked(tmp_path, new), skipped=(Skipped(run / "global_step_1", "being saved"),))
    assert [row.step for row in work(unread)[0].report.rows] == [2], "its checkpoint is there, and may be another one"
    shutil.rmtree(run / "global_step_1" / "actor")
    (tmp_path / "eval" / "results" / "other.parquet").write_text("no unit")
    pruned = Skipped(run / "global_step_1", "no actor/ in it (pruned)")
    request = asked(tmp_path, dataclasses.replace(new, run="longer"))
    again, _, _ = work(dataclasses.replace(request, skipped=(pruned,)))
    assert [(row.run, row.step, row.dataset) for row in again.report.rows] == [
        ("longer", 1, "sums"),
        ("longer", 2, "sums"),
    ]
    assert again.report.skipped == ()
    assert [row.step for row in work(request)[0].report.rows] == [2]


def test_another_evaluation_has_a_log_of_its_own(tmp_path: Path) -> None:
    with evaluation._log(tmp_path) as first:
        first.write_text("mine")
        with evaluation._log(tmp_path) as second:
            assert second.name == f"engine-{os.getpid()}.log"
        assert first.read_text() == "mine"
    with evaluation._log(tmp_path) as again:
        assert again == first
        assert not again.exists()


class Training:
    """A run that saves more steps before each look of those who watch it."""

    def __init__(self, folder: Path, looks: list[list[int]]) -> None:
        self.folder, self.looks, self.saved = folder, looks, list[Checkpoint]()
        self.shown: list[list[int | None]] = []

    def __call__(self, *_: Any) -> Iterator[bool]:
        for number, steps in enumerate(self.looks):
            self.saved += [checkpoint(self.folder, step) for step in steps]
            yield number < len(self.looks) - 1

    def lookup(self) -> Request:
        if not self.saved:
            raise NothingMatched("nothing yet")
        return asked(self.folder, *self.saved)

    def show(self, report: Report) -> None:
        self.shown.append([row.step for row in report.rows])

    def watched(self) -> list[int | None]:
        """Steps in the last report."""
        finished = watch(self.lookup, ["x"], Reported().progress, self.show)
        return [row.step for row in finished.report.rows]


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    run = Training(tmp_path, [[], [1], [], [2, 3], [4]])
    monkeypatch.setattr(evaluation, "looks", run)
    monkeypatch.setattr(Request, "again", lambda self: dataclasses.replace(self, checkpoints=tuple(run.saved)))
    return run


def test_each_new_step_is_evaluated_by_the_same_engine(training: Training, engines: Engines) -> None:
    assert training.watched() == [1, 2, 3, 4]
    assert training.shown == [[1], [1, 2, 3]], "not the last: that is the result"
    assert [order.weights.hf.name for order in engines.orders] == ["1", "2", "3", "4"]
    assert (len(engines.jobs), engines.up) == (1, 0)


def test_a_look_at_nothing_new_does_nothing(
    training: Training, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.looks = [[1], [], [], [2], [], []]
    written: list[int] = []
    monkeypatch.setattr(Report, "write", lambda self, folder: written.append(len(self.rows)))
    training.watched()
    assert written == [1, 2, 2], "at what is new, and at the end"


def test_a_look_without_new_results_shows_nothing(training: Training, engines: Engines) -> None:
    training.looks = [[1], [], []]
    show = training.show

    def relabel(report: Report) -> None:
        show(report)
        training.saved[0] = dataclasses.replace(training.saved[0], run="longer")

    training.show = relabel  # type: ignore[method-assign]
    assert training.watched() == [1]
    assert training.shown == [[1]]


def test_a_run_that_saves_nothing(training: Training, engines: Engines) -> None:
    training.looks = [[], [], []]
    with pytest.raises(NothingMatched):
        training.watched()


def test_steps_that_vanish_do_not_undo_what_was_found(
    training: Training, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.looks = [[1], []]
    monkeypatch.setattr(training, "show", lambda report: shutil.rmtree(training.saved[0].hf))
    assert training.watched() == [1]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("checkpoints/*", True),
        ("checkpoints", True),
        ("checkpoints/", True),
        ("checkpoints/p/run", True),
        ("checkpoints/p/run/", True),
        ("checkpoints/p/run/*", True),
        ("checkpoints/p/run/global_step_*", True),
        ("checkpoints/p/run/global_step_40/actor", True),
        ("checkpoints/*/r*", True),
        ("checkpoints/p/other", False),
        ("checkpoints/p/run2/*", False),
        ("elsewhere/*", False),
    ],
)
def test_patterns_name_runs_that_have_saved_nothing_yet(
    pattern: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = str(paths.absolute(pattern))
    assert evaluation.names_checkpoints(wanted, tmp_path / "checkpoints" / "p" / "run") is named


def test_looks_go_on_until_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        name = "a"
        state: str | None = "running"

    run = Run()
    monkeypatch.setattr(evaluation, "behind", lambda patterns: [run])
    said: list[str] = []
    looks = evaluation.looks(["x"], said.append, poll_s=0)
    assert next(looks)
    assert next(looks)
    assert [text.partition(":")[0] for text in said] == ["watching a"]
    run.state = "done"
    assert list(looks) == [False]


def test_no_run_is_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "all_runs", list[RunOnDisk])
    assert list(evaluation.looks(["x"], lambda text: None, poll_s=0)) == [False]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return sample_rows.write(tmp_path / "test.parquet")


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def step(run: Path, number: int = 1) -> Path:
    return model(run / f"global_step_{number}" / "actor" / "huggingface")


def find(rows: Path, *patterns: Path, **options: Any) -> Request:
    settings: dict[str, Any] = {"base": None, "baseline": None, "limit": None, "out": None, "sampling": Sampling()}
    return Request.find(
        [str(one) for one in patterns], dataset=str(rows), engine=EngineSettings(rollout="int8"), **settings | options
    )


def test_base_and_baseline_come_first_and_once(tmp_path: Path, rows: Path) -> None:
    start, saved = model(tmp_path / "start"), step(tmp_path / "p" / "a")
    for patterns in ([saved], [saved, start]):
        request = find(rows, *patterns, base=str(start))
        assert [one.hf for one in request.checkpoints] == [start, saved]
        assert request.base == request.checkpoints[0]
        assert request.prompts == 8
    both = find(rows, saved, base=str(start), baseline=str(start), limit=2)
    assert [one.hf for one in both.checkpoints] == [start, saved]
    assert both.base == both.baseline == both.checkpoints[0]
    assert both.prompts == 4
    assert both.settings()["rollout"] == "int8"
    assert [one.hf for one in find(rows, saved, baseline=str(saved)).checkpoints] == [saved]


def test_results_go_to_the_run_or_the_project(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b, c = (step(tmp_path / run).parents[2] for run in ("p/a", "p/b", "q/c"))
    assert find(rows, a).folder == a / "eval"
    assert find(rows, a, b).folder == tmp_path / "p" / "eval"
    assert find(rows, a, c).folder == tmp_path / "eval"
    assert find(rows, model(tmp_path / "hf")).folder == tmp_path / "eval"
    assert find(rows, a, out=Path("there")).folder == tmp_path / "there"


def test_looking_again_finds_what_is_new(tmp_path: Path, rows: Path) -> None:
    run = tmp_path / "p" / "a"
    first, base = step(run, 1), model(tmp_path / "start")
    request = find(rows, run / "*", base=str(base))
    second = step(run, 2)
    assert [one.hf for one in request.again().checkpoints] == [base, first, second]
    assert request.again().folder == request.folder


def with_profile(
    folder: Path, rollout: str = "int8", file: Path | None = None, rotation: int | str = "auto", **config: Any
) -> None:
    made = saved_profile(folder / "p", {"a.rows": [2.0]}, shape={"hidden_size": 64})
    (folder / "config.json").write_text(json.dumps(config))
    check_profile(
        EngineSettings(rollout=rollout, profile=str(file or made), rotation=rotation), [folder / "none", folder]
    )


def test_a_profile_that_can_be_applied(tmp_path: Path) -> None:
    with_profile(tmp_path, hidden_size=64)
    with_profile(tmp_path, "fp8", hidden_size=64)
    with_profile(tmp_path, rotation=0, hidden_size=64)
    check_profile(EngineSettings(rollout="bf16"), [tmp_path])


def test_a_profile_that_cannot_be_applied(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bf16 loses nothing") as error:
        with_profile(tmp_path, "bf16")
    assert error.value.hint == "--rollout int8"
    with pytest.raises(InputError, match="cannot be read"):
        with_profile(tmp_path, file=tmp_path / "nothing")
    with pytest.raises(InputError, match=r"--rotation 64 mixes the channels for which .* was made"):
        with_profile(tmp_path, rotation=64, hidden_size=64)
    with pytest.raises(InputError, match="quantized already"):
        with_profile(tmp_path, quantization_config={})
    with pytest.raises(InputError, match=r"of another model than .*hidden_size = 64, and the model has 128"):
        with_profile(tmp_path, hidden_size=128)

"""Every variant has its engine in turn; what fails, does not fit or is interrupted costs nothing that was measured."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import contract
from flashrl_cli.bench import run
from flashrl_cli.bench.job import parse
from flashrl_cli.bench.report import Report
from flashrl_cli.bench.request import FIT, Machine
from flashrl_cli.bench.run import Measured, Pace, Point, Progress, Session, Store, count, points
from flashrl_cli.errors import RunFailed
from flashrl_cli.signals import Interrupted
from flashrl_cli.verl.causes import CAUSES
from flashrl_cli.worker import client
from tests.unit.bench.lab import HF, MISMATCH, OPTIONS, Workers, facts, obedient, request

CUDA = Machine("cuda", "H100")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    found = Workers()
    monkeypatch.setattr(client, "worker", found)
    yield found
    assert found.running == 0


class Heard:
    def __init__(self) -> None:
        self.words: list[str] = []
        self.done = 0
        self.finished: list[int] = []

    @property
    def progress(self) -> Progress:
        return Progress(say=self.words.append, advance=self._advance, finished=self._finished)

    def _finished(self, measured: Sequence[Measured]) -> None:
        self.finished.append(sum(len(one.results) for one in measured))

    def _advance(self, n: int, note: str) -> None:
        self.done += n


def measure(folder: Path, rollout: str = "bf16,int8", heard: Heard | None = None, **changed: Any) -> Report:
    asked = request(folder, rollout, **changed)
    session = Session(asked, (heard or Heard()).progress)
    session.work()
    return Report(asked, session.measured, ["flashrl", "bench"])


def test_each_variant_has_an_engine_and_the_scorer_comes_last(workers: Workers, tmp_path: Path) -> None:
    heard = Heard()
    report = measure(tmp_path, heard=heard, model=HF, mismatch=MISMATCH, refit=True)
    engine = ["start", "speed", "speed", "sample", "refit"]
    assert workers.asked == [
        *(("bf16", kind) for kind in engine),
        *(("int8", kind) for kind in engine),
        ("scorer", "score"),
        ("scorer", "score"),
    ]
    assert not report.failed
    assert heard.done == 12
    assert heard.finished == list(range(1, 13))
    assert "int8, 4 sequences: 80 tokens/s; more than 0 s left" in heard.words


def test_engines_are_told_their_weights_prompts_and_options(workers: Workers, tmp_path: Path) -> None:
    measure(tmp_path, "bf16,int8+head32", model=HF, mismatch=MISMATCH)
    plain, changed, scorer = workers.jobs
    assert plain["weights"]["hf"] == "/hf"
    assert plain["questions"] is not None
    assert [job["arguments"]["quantization"] for job in (plain, changed)] == [None, "flashrl_int8"]
    assert scorer == {"model": "/hf", "dtype": "bfloat16"}
    options = [env.get(contract.ENV_ROLLOUT, "") for env in workers.environments]
    assert "lm_head_fp32" not in options[0]
    assert '"lm_head_fp32": true' in options[1]
    assert all(env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" for env in workers.environments[:2])


def test_a_shape_has_no_weights_but_a_config(workers: Workers, tmp_path: Path) -> None:
    measure(tmp_path, "int8")
    assert (workers.jobs[0]["weights"], workers.jobs[0]["questions"]) == (None, None)
    assert Path(workers.jobs[0]["model"]).name == "model"


def test_what_is_kept_is_not_measured_again(workers: Workers, tmp_path: Path) -> None:
    first = measure(tmp_path, model=HF, mismatch=MISMATCH).document()
    workers.asked.clear()
    assert measure(tmp_path, model=HF, mismatch=MISMATCH).document() == first
    assert workers.asked == []
    measure(tmp_path, fresh=True)
    assert len(workers.asked) == 6


def test_lost_samples_are_made_again(workers: Workers, tmp_path: Path) -> None:
    measure(tmp_path, "int8", model=HF, mismatch=MISMATCH)
    for file in tmp_path.glob("*.npz"):
        file.unlink()
    workers.asked.clear()
    measure(tmp_path, "int8", model=HF, mismatch=MISMATCH)
    assert workers.asked == [("int8", "start"), ("int8", "sample")]


def test_a_failure_ends_its_variant_alone_and_keeps_its_points(workers: Workers, tmp_path: Path) -> None:
    def answer(precision: str, asked: dict[str, Any]) -> dict[str, Any]:
        if precision == "bf16" and asked.get("batch") == 16:
            raise RunFailed("out of memory\nmore of it", hint="a smaller --batch")
        return obedient(precision, asked)

    workers.answer = answer
    heard = Heard()
    report = measure(tmp_path, heard=heard)
    bf16, int8 = report.document()["variants"]
    assert (bf16["status"], bf16["problem"], bf16["hint"]) == (
        "failed",
        "out of memory\nmore of it",
        "a smaller --batch",
    )
    assert [speed["batch"] for speed in bf16["speed"]] == [4]
    assert (int8["status"], len(int8["speed"])) == ("ok", 2)
    assert [one.variant.name for one in report.failed] == ["bf16"]
    assert "bf16 failed: out of memory" in heard.words
    workers.answer = obedient
    workers.asked.clear()
    measure(tmp_path)
    assert workers.asked == [("bf16", "start"), ("bf16", "speed")]


def test_an_engine_that_holds_something_else_gives_no_number(workers: Workers, tmp_path: Path) -> None:
    workers.answer = lambda precision, asked: (
        facts(precision="bf16") if asked["kind"] == "start" else obedient(precision, asked)
    )
    (int8,) = measure(tmp_path, "int8").document()["variants"]
    assert int8["status"] == "failed"
    assert "the engine holds bf16" in int8["problem"]
    assert (int8["engine"], int8["speed"]) == (None, [])
    assert list(tmp_path.glob("*.json")) == []


def test_what_the_machine_lacks_starts_no_engine(workers: Workers, tmp_path: Path) -> None:
    report = measure(tmp_path, "fp8,int8")
    assert {name for name, _ in workers.asked} == {"int8"}
    assert report.document()["variants"][0]["problem"] == "FP8 rollouts need a GPU (compute capability 8.9 or newer)"


def test_an_interruption_keeps_what_is_finished(workers: Workers, tmp_path: Path) -> None:
    def answer(precision: str, asked: dict[str, Any]) -> dict[str, Any]:
        if asked.get("batch") == 16:
            raise Interrupted(signal.SIGINT, "again")
        return obedient(precision, asked)

    workers.answer = answer
    with pytest.raises(Interrupted):
        measure(tmp_path, "int8")
    workers.answer = obedient
    workers.asked.clear()
    measure(tmp_path, "int8")
    assert workers.asked == [("int8", "start"), ("int8", "speed")]


@pytest.mark.parametrize(("budget", "status", "speeds"), [(115.0, "ok", 2), (75.0, "partial", 1)])
def test_a_budget_leaves_out_and_says_so(
    budget: float, status: str, speeds: int, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    report = measure(tmp_path, "bf16,int8", budget=budget)
    bf16, int8 = report.document()["variants"]
    assert (bf16["status"], len(bf16["speed"])) == (status, speeds)
    assert int8["status"] == "left out"
    assert not report.failed
    assert ("bf16, 16 sequences: left out, the budget has no room for it" in bf16["notes"]) == (speeds == 1)
    assert any("int8: left out, the budget has no room" in line for line in report.sentences())


@pytest.mark.parametrize("batches", [(FIT, 4), (4, FIT), (FIT,)])
def test_how_many_sequences_fit_tells_nothing_of_other_batches(
    batches: tuple[int, ...], workers: Workers, tmp_path: Path
) -> None:
    heard = Heard()
    report = measure(tmp_path, "int8", heard=heard, batches=batches)
    assert len(report.document()["variants"][0]["speed"]) == len(batches)
    assert not any("left" in words for words in heard.words)


def test_fp8_in_blocks_is_measured_as_any_other(workers: Workers, tmp_path: Path) -> None:
    report = measure(tmp_path, "fp8-block", machine=CUDA, model=HF, mismatch=MISMATCH, refit=True)
    assert [kind for _, kind in workers.asked] == ["start", "speed", "speed", "sample", "refit", "score"]
    (blocks,) = report.document()["variants"]
    assert (blocks["status"], blocks["refit"]["seconds"], blocks["mismatch"]["tokens"]) == ("ok", 0.1, 40)
    assert workers.jobs[0]["weights"]["hf"] == "/hf"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in workers.environments[0]


def test_fp8_in_blocks_needs_verl_and_the_others_do_not(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "verl" else name)
    report = measure(tmp_path, "fp8,fp8-block", machine=CUDA)
    fp8, blocks = report.document()["variants"]
    assert (fp8["status"], blocks["status"]) == ("ok", "failed")
    assert "verl is not installed" in blocks["problem"]
    assert {precision for precision, _ in workers.asked} == {"fp8"}


def test_hints_are_for_causes_that_are_known() -> None:
    assert set(run.HINTS) <= {cause.id for cause in CAUSES}


def test_the_document_and_the_table_say_the_same(workers: Workers, tmp_path: Path) -> None:
    report = measure(tmp_path, model=HF, mismatch=MISMATCH, refit=True)
    document = report.document()
    assert (document["schema_version"], document["base"], document["device"]) == (1, "bf16", "a CPU")
    assert document["variants"][0]["speed"][0]["speed_up"] is None
    assert document["variants"][1]["speed"][1]["speed_up"]["value"] == 2.0
    columns, rows = report.table()
    int8 = dict(zip(columns[1:], rows[1][1:], strict=True))
    assert (int8["tok/s at 16"], int8["weights GiB"], int8["refit s"]) == (320, 1.0, 0.1)
    assert (int8["mean |Δ log p|"], int8["KL (k3)"], int8["share > 2"]) == (0.01, 0.002, 0.025)
    assert "at 16 sequences: int8 gives 2.00x (1.98 to 2.02) of bf16" in report.sentences()
    assert "int8 against the trainer: KL 0.002 nats a token (k3), 2.5 % of 40 weights above 2, the largest 3" in (
        report.sentences()
    )


def test_a_policy_that_knows_nothing_is_warned_of(workers: Workers, tmp_path: Path) -> None:
    workers.answer = lambda precision, asked: {
        **obedient(precision, asked),
        **({"knows_nothing": True} if asked["kind"] == "score" else {}),
    }
    report = measure(tmp_path, "int8", model=HF, mismatch=MISMATCH)
    assert any(line.startswith("warning: the model's entropy") for line in report.sentences())


POINT = Point(variant="int8", kind="speed", asked={"batch": 4}, key="abc")


def keys(folder: Path, **changed: Any) -> set[str]:
    asked = request(folder, "int8", **changed)
    return {point.key for point in points(asked, asked.variants[0])}


def test_points_come_in_their_order_and_refits_last(tmp_path: Path) -> None:
    asked = request(tmp_path, "int8,fp8-block", model=HF, refit=True, mismatch=MISMATCH)
    kinds = [[point.kind for point in points(asked, one)] for one in asked.variants]
    assert kinds == [["start", "speed", "speed", "sample", "score", "refit"]] * 2
    assert count(asked) == 12
    assert next(points(asked, asked.variants[0])).label == "int8, start"
    assert [point.label for point in points(asked, asked.variants[0])][1] == "int8, 4 sequences"


@pytest.mark.parametrize(
    ("changed", "shared"),
    [
        ({"model": HF}, 0),
        ({"variants": parse("int8+kv8", None)}, 0),
        ({"options": dataclasses.replace(OPTIONS, max_num_seqs=17)}, 0),
        ({"versions": {"vllm": "0.24.0"}}, 0),
        ({"machine": Machine("cuda", "H100")}, 0),
        ({"prompt": 9}, 1),
        ({"repeats": 1}, 1),
        ({"batches": (4, 32)}, 2),
        ({"engine": dataclasses.replace(OPTIONS, gpu_memory_utilization=0.8)}, 3),  # memory that happens to be free
    ],
)
def test_a_point_is_another_if_anything_that_it_depends_on_is(
    changed: dict[str, Any], shared: int, tmp_path: Path
) -> None:
    assert len(keys(tmp_path)) == 3
    assert len(keys(tmp_path) & keys(tmp_path, **changed)) == shared


def test_the_trainers_dtype_changes_the_score_alone(tmp_path: Path) -> None:
    asked = {"model": HF, "mismatch": MISMATCH}
    other = {"model": HF, "mismatch": dataclasses.replace(MISMATCH, dtype="float32")}
    assert len(keys(tmp_path, **asked) - keys(tmp_path, **other)) == 1


def test_results_are_kept_and_fresh_passes_over_earlier_ones(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.load(POINT) is None
    store.save(POINT, {"tokens_s": 5.0})
    assert Store(tmp_path).load(POINT) == {"tokens_s": 5.0}
    assert json.loads((tmp_path / "abc.json").read_text())["asked"] == {"batch": 4}
    fresh = Store(tmp_path, fresh=True)
    assert fresh.load(POINT) is None
    fresh.save(POINT, {"tokens_s": 6.0})
    assert fresh.load(POINT) == {"tokens_s": 6.0}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 0, "result": {}}'])
def test_what_cannot_be_read_counts_for_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "abc.json").write_text(text)
    assert Store(tmp_path).load(POINT) is None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_budget_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    clock = Clock()
    first, second = (list(points(request(tmp_path), one)) for one in request(tmp_path).variants)
    pace = Pace(100.0, clock)
    assert pace.fits(first), "nothing is known yet"
    pace.note(first[0], 60.0)
    clock.now = 30.0
    assert pace.fits([first[1]])
    assert pace.fits([second[0]])
    clock.now = 50.0
    assert not pace.fits([second[0]])
    assert Pace(None, clock).fits(second)


def test_the_time_that_is_left(tmp_path: Path) -> None:
    """Known once a like point was measured; a larger batch takes no more a sequence."""
    pace = Pace(None, Clock())
    start, few, many = points(request(tmp_path), request(tmp_path).variants[0])
    assert pace.expected(many) is None
    pace.note(start, 60.0)
    assert pace.left([few]) == ""
    assert pace.left([start, few]) == "more than 60 s left"
    pace.note(few, 10.0)
    assert pace.expected(many) == 40.0
    assert pace.left([start, few]) == "about 70 s left"
    assert pace.left([start, few, many]) == "about 2 min left"
    assert pace.left([]) == ""
    pace.note(many, 12.0)
    assert pace.expected(many) == 12.0

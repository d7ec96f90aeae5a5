"""`flashrl eval`, as people and programs call it; a scripted engine answers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.cli import app as cli
from flashrl_cli.cli.eval import Speed, evaluate
from flashrl_cli.errors import BelowThreshold, FlashrlError, InputError, NothingMatched, RunFailed
from flashrl_cli.evals import evaluation
from flashrl_cli.evals.job import Job, Order
from flashrl_cli.evals.questions import Question
from flashrl_cli.evals.results import Grade, Response
from tests import sample_rows
from tests.unit.evals.lab import Engines, Graders, answer, checkpoint, scripted


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    return scripted(monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(sample_rows.write(tmp_path / "sums.parquet"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two steps that hold merged weights."""
    folder = tmp_path / "p" / "run"
    for step in (1, 2):
        hf = checkpoint(tmp_path / "made", step).hf
        (hf / "tokenizer.json").write_text("{}")
        target = folder / f"global_step_{step}" / "actor" / "huggingface"
        target.parent.mkdir(parents=True)
        hf.rename(target)
    return folder


def test_a_table_what_it_means_and_where_it_is(
    run: Path, data: str, engines: Engines, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate([str(run)], dataset=data)
    out, err = capsys.readouterr()
    assert "95 % interval" in out
    assert "1.000" in out
    assert "sums: step 2, the best, is not distinguishable from step 1" in out
    assert "written to" not in out
    assert f"written to {run / 'eval'}" in err
    assert "run step 2, sums: 4 prompts in 1.0 s, 12 tokens/s" in err


def test_json_is_one_document(run: Path, data: str, engines: Engines, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate([f"{run}/*"], dataset=data, json=True, limit=2, out=run / "there")
    document = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["n"]) for row in document["results"]] == [(1, 2), (2, 2)]
    assert document == json.loads((run / "there" / "eval.json").read_text())


class HalfRight(Graders):
    """Every second response is right."""

    def grade(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Grade]:
        found = super().grade(questions, responses)
        return [dataclasses.replace(one, correct=number % 2 == 0) for number, one in enumerate(found)]


def test_below_a_threshold_it_ends_with_5_after_everything_is_written(
    run: Path, data: str, engines: Engines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "Graders", HalfRight)
    evaluate([str(run)], dataset=data, fail_under="0.5", json=True)
    document = json.loads(capsys.readouterr().out)
    judged = [{"run": "run", "step": 2, "dataset": "sums", "accuracy": 0.5, "passed": True}]
    assert document["threshold"] == {"fail_under": 0.5, "passed": True, "judged": judged, "missing": []}
    for as_json in (False, True):
        with pytest.raises(BelowThreshold, match=r"--fail-under 0\.51 is not reached") as caught:
            evaluate([str(run)], dataset=data, fail_under="0.51", json=as_json)
        assert [(one.where, one.message) for one in caught.value.problems] == [
            ("run step 2, sums", "accuracy 0.5 is below 0.51")
        ]
        out, _ = capsys.readouterr()
        written = json.loads((run / "eval" / "eval.json").read_text())
        assert written["threshold"]["passed"] is False
        assert json.loads(out) == written if as_json else "95 % interval" in out
    assert len(engines.orders) == 2, "what was evaluated is not evaluated again for another threshold"
    evaluate([str(run)], dataset=data, json=True)
    assert json.loads(capsys.readouterr().out)["threshold"] is None


def test_a_newest_step_that_cannot_be_read_does_not_pass(
    run: Path, data: str, engines: Engines, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run / "global_step_2" / "actor" / "huggingface" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BelowThreshold) as caught:
        evaluate([str(run)], dataset=data, fail_under="0.5")
    assert [one.where for one in caught.value.problems] == [str(weights.parent)]
    assert "95 % interval" in capsys.readouterr().out


def test_watching_gives_json_lines_and_judges_the_end_alone(
    run: Path, data: str, engines: Engines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy is not good at first; a threshold that ended the watching would never see what it becomes."""
    monkeypatch.setattr(evaluation, "looks", lambda patterns, say: iter([True, True, False]))
    monkeypatch.setattr(evaluation, "Graders", HalfRight)
    with pytest.raises(BelowThreshold):
        evaluate([str(run)], dataset=data, json=True, watch=True, fail_under="0.6")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["results"]) for line in lines] == [2, 2], "one when something was new, and the last"
    assert [line["threshold"]["passed"] for line in lines] == [False, False], "in each document, judged at the end"
    evaluate([str(run)], dataset=data, json=True, watch=True, fail_under="0.4")


def test_a_threshold_that_is_none_is_refused_before_anything_starts(
    run: Path, data: str, engines: Engines, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--fail-under 80%: a share between 0 and 1"):
        evaluate([str(run)], dataset=data, fail_under="80%")
    with pytest.raises(InputError, match="--merge evaluates nothing"):
        evaluate([str(run)], fail_under="0.8", merge=tmp_path / "merged")
    assert not engines.jobs
    assert not (tmp_path / "merged").exists()
    assert not (run / "eval").exists()


@pytest.mark.parametrize("fail_under", [None, "0.5"])
def test_what_was_skipped_is_reported(
    fail_under: str | None, run: Path, data: str, engines: Engines, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run / "global_step_1" / "actor" / "huggingface" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RunFailed, match="1 checkpoint was refused and has no result"):
        evaluate([str(run)], dataset=data, png=True, fail_under=fail_under)
    err = capsys.readouterr().err
    assert f"warning: skipped {weights.parent}" in err
    assert "no eval.png: a curve needs two steps of a run" in err


def test_bad_words(run: Path, data: str, engines: Engines, tmp_path: Path) -> None:
    with pytest.raises(NothingMatched):
        evaluate([str(tmp_path / "nothing" / "*")], dataset=data)
    with pytest.raises(InputError, match="not prepared"):
        evaluate([str(run)], dataset="gsm8k")
    with pytest.raises(InputError, match="no run record says"):
        evaluate([str(run)])
    assert not engines.jobs


@pytest.mark.parametrize(
    ("rotation", "rollout", "problem"),
    [
        ("48", "int8", "--rotation 48: no such block"),
        ("64", "fp8", "--rotation 64 is not for fp8"),
        ("64", "int8", None),
        ("off", "int8", None),
    ],
)
def test_blocks_of_a_rotation(
    run: Path, data: str, engines: Engines, rotation: str, rollout: Any, problem: str | None
) -> None:
    if problem:
        with pytest.raises(InputError, match=problem):
            evaluate([str(run)], dataset=data, rollout=rollout, rotation=rotation)
        assert not engines.jobs
        return
    evaluate([str(run)], dataset=data, rollout=rollout, rotation=rotation)
    assert [job.engine.rotation for job in engines.jobs] == [0 if rotation == "off" else 64]


def test_prompts_and_sampling_of_ones_own(run: Path, data: str, engines: Engines, tmp_path: Path) -> None:
    template = tmp_path / "qa.jinja"
    template.write_text("{{ messages[-1].content }} {{ mood }} {{ n }} {{ who }} {{ all }}")
    stop = [r"\n\n", r"\\neq", "é:"]
    evaluate(
        [str(run)], dataset=data, top_k=7, stop=stop, system="Add.", chat_template=str(template),
        template_arg=["mood=True", "n=1", "who=a=b", "all=[1, 2]", "mood=false"],
    )  # fmt: skip
    (job,) = engines.jobs
    assert (job.sampling.top_k, job.sampling.stop) == (7, ("\n\n", r"\neq", "é:"))
    assert job.prompting.chat_template == template.read_text()
    assert job.prompting.arguments == {"mood": False, "n": 1, "who": "a=b", "all": [1, 2]}
    evaluate([str(run)], dataset=data, chat_template="none", gpus="2")
    assert [job.prompting.chat_template for job in engines.jobs[1:]] == [""] * 2
    document = json.loads((run / "eval" / "eval.json").read_text())
    assert document["prompting"] == {"system": None, "shots": 0, "chat_template": "", "arguments": {}}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"stop": ["a", ""]}, "--stop: an empty text"),
        ({"chat_template": "nothing.jinja"}, "--chat-template nothing.jinja: .*No such file"),
        ({"template_arg": ["thinking"]}, "--template-arg thinking: no KEY=VALUE"),
        ({"template_arg": ["a b=1"]}, "no KEY=VALUE"),
        ({"template_arg": ["thinking=1"]}, "--template-arg thinking: no chat template of these models mentions it"),
        ({"shots": 2}, "--shots 2: no training rows"),
        ({"gpus": "0"}, "--gpus 0: no number of GPUs"),
        ({"gpus": "many"}, "--gpus many"),
        ({"gpus": "3", "tp": 2}, "--gpus 3 cannot be divided into engines of 2 GPUs"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_starts(
    run: Path, data: str, engines: Engines, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        evaluate([str(run)], dataset=data, **options)
    assert caught.value.hint
    assert not engines.jobs


def test_several_models_side_by_side(
    run: Path, data: str, engines: Engines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "Graders", HalfRight)
    models = [str(run / f"global_step_{step}" / "actor" / "huggingface") for step in (1, 2)]
    for step, name in enumerate("ab"):
        Path(models[step]).rename(run.parent / name)
    places = [str(run.parent / name) for name in "ab"]
    evaluate(places, dataset=data, png=True, html=True, out=run.parent / "out")
    out, err = capsys.readouterr()
    assert "sums: a, the best, is not distinguishable from b: 0.0 points" in out
    assert "no leaderboard" not in err
    page = (run.parent / "out" / "leaderboard.html").read_text()
    assert "2 models on sums" in page
    assert (run.parent / "out" / "leaderboard.png").stat().st_size > 1000
    assert not (run.parent / "out" / "eval.png").exists()
    evaluate(places[:1], dataset=data, png=True, html=True, out=run.parent / "one")
    err = capsys.readouterr().err
    assert "no leaderboard.html: a leaderboard needs several models" in err
    assert "no eval.png: a curve needs two steps of a run" in err
    assert not (run.parent / "one" / "leaderboard.html").exists()


def test_a_signal_ends_it_in_order(run: Path, data: str, engines: Engines) -> None:
    def interrupted(job: Job, order: Order) -> Any:
        yield from itertools.islice(answer(job, order), 2)
        signal.raise_signal(signal.SIGTERM)

    engines.script = interrupted
    with pytest.raises(FlashrlError, match="stopped by SIGTERM") as caught:
        evaluate([str(run)], dataset=data)
    assert caught.value.exit_code == 143
    assert engines.up == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    engines.script = answer
    evaluate([str(run)], dataset=data)
    assert engines.orders[1].questions == (1, 2, 3), "it goes on"


def test_show_is_a_word_of_eval() -> None:
    assert cli._words(["eval", "show", "x", "--worst"]) == ["eval show", "x", "--worst"]
    for words in (["eval", "./show"], ["eval", "x", "show"], ["runs", "show", "x"], []):
        assert cli._words(words) == words


def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 12.0, 14.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    speed = Speed()
    assert speed.after(0) == ""
    assert speed.after(50) == "", "from when the first ones came"
    assert speed.after(2000) == "1,000 tokens/s"
    assert speed.after(6000) == "2,000 tokens/s"

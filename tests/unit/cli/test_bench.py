"""`flashrl bench`, as people and programs call it; scripted engines answer."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import files
from flashrl_cli.bench import request
from flashrl_cli.bench import request as requests
from flashrl_cli.bench.request import Machine
from flashrl_cli.cli.app import main
from flashrl_cli.cli.bench import _say_waiting as say
from flashrl_cli.errors import RunFailed
from flashrl_cli.render import figure
from flashrl_cli.render.output import Output
from flashrl_cli.worker import client
from tests.unit.bench.lab import HF, MISMATCH, Workers, obedient

Call = Callable[..., tuple[int, str, str]]
WORDS = ("bench", "--model", "shape:0.5b/2")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    found = Workers()
    monkeypatch.setattr(client, "worker", found)
    monkeypatch.setattr(request, "here", lambda: Machine("cpu", "a CPU"))
    return found


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, stdout and stderr of `flashrl WORDS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHRL_RUNS", str(tmp_path / "runs"))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashrl", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return run


def test_a_table_a_verdict_and_what_was_taken_by_default(workers: Workers, call: Call) -> None:
    code, out, err = call(*WORDS)
    assert code == 0
    assert "tok/s at 16" in out
    assert "at 16 sequences: int8 gives 2.00x (1.98 to 2.02) of bf16" in out
    assert "on a CPU by default: --batch 4,16, --prompt 64, --response 32" in err
    assert "int8, 4 sequences: 80 tokens/s" in err


def test_json_is_one_document_and_the_file_is_the_same(workers: Workers, call: Call, tmp_path: Path) -> None:
    code, out, _ = call(*WORDS, "--json", "--out", "deep/b.json", "--png", "b.png")
    assert code == 0
    document = json.loads(out)
    assert document == json.loads((tmp_path / "deep" / "b.json").read_text())
    assert document["command"][:2] == ["flashrl", "bench"]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_speed_and_mismatch_are_one_picture_and_one_sentence(
    workers: Workers, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INT8 is twice as fast as bf16, and as near: it is to be taken, and bf16 is beaten."""
    monkeypatch.setattr(request, "find", lambda _: HF)
    monkeypatch.setattr(request, "_mismatch", lambda *_: MISMATCH)
    drawn: list[str] = []
    monkeypatch.setattr(figure, "write_fronts_png", lambda fronts, path, about: drawn.extend([*fronts, about]))
    code, out, _ = call("bench", "--mismatch", "--data", "sums", "--json", "--png", "b.png")
    assert code == 0
    document = json.loads(out)
    sentence = "at 16 sequences, by speed and KL: take int8, 2.00x of bf16, KL 0.002; int8 is 2.00x as fast as bf16 and"
    assert any(verdict.startswith(sentence) for verdict in document["verdicts"])
    assert [(front["batch"], front["take"]) for front in document["fronts"]] == [(4, "int8"), (16, "int8")]
    assert [point["beaten_by"] for point in document["fronts"][0]["points"]] == ["int8", None]
    assert drawn == ["4 sequences", "16 sequences", "tiny, 64-token prompts, 32 new tokens, a CPU"]


def test_a_failure_is_shown_with_what_was_measured_and_ends_with_1(
    workers: Workers, call: Call, tmp_path: Path
) -> None:
    def answer(precision: str, asked: dict[str, Any]) -> dict[str, Any]:
        if precision == "int8":
            raise RunFailed("a GPU ran out of memory", hint="a smaller --batch")
        return obedient(precision, asked)

    workers.answer = answer
    code, out, err = call(*WORDS, "--out", "b.json")
    assert code == 1
    assert "160" in out
    assert "failed" in out
    assert "error: 1 of 2 variants could not be measured in full\n  int8: a GPU ran out of memory" in err
    assert "hint: a smaller --batch" in err
    assert json.loads((tmp_path / "b.json").read_text())["variants"][1]["status"] == "failed"


def test_an_interruption_leaves_what_there_is(workers: Workers, call: Call, tmp_path: Path) -> None:
    def answer(precision: str, asked: dict[str, Any]) -> dict[str, Any]:
        if precision == "int8" and asked.get("batch") == 16:
            os.kill(os.getpid(), signal.SIGINT)
        return obedient(precision, asked)

    workers.answer = answer
    code, out, err = call(*WORDS, "--out", "b.json", "--json")
    assert (code, out) == (130, "")
    assert "hint: the same command goes on from here" in err
    bf16, int8 = json.loads((tmp_path / "b.json").read_text())["variants"]
    assert (bf16["status"], int8["status"], len(int8["speed"])) == ("ok", "partial", 1)
    assert workers.running == 0


def test_nothing_to_draw_is_said(workers: Workers, call: Call, tmp_path: Path) -> None:
    code, _, err = call(*WORDS, "--rollout", "fp8", "--png", "b.png")
    assert code == 1
    assert "no speed was measured" in err
    assert not (tmp_path / "b.png").exists()


def test_bad_words_end_with_2_and_start_nothing(workers: Workers, call: Call, tmp_path: Path) -> None:
    code, out, err = call("bench", "--batch", "0")
    assert (code, out) == (2, "")
    assert "hint: --batch 64,256" in err
    assert workers.asked == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--out", "--png"])
def test_a_file_that_cannot_be_written_is_told_before_an_engine_starts(
    workers: Workers, call: Call, tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").touch()
    for place, text in (
        ("file/b", f"{tmp_path / 'file'} cannot be written to"),
        (".", f"{option} {tmp_path} is a folder"),
    ):
        code, _, err = call(*WORDS, option, place)
        assert code == 2
        assert text in err
        assert f"hint: {option} " in err
    assert not workers.asked


def test_what_a_disk_refuses_is_no_traceback(
    workers: Workers, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    code, _, err = call(*WORDS, "--dir", "file/deep")
    assert code == 3
    assert err.endswith("FLASHRL_DEBUG=1 shows what was done with it\n")
    assert f"error: {tmp_path / 'file'}" in err
    monkeypatch.setenv("FLASHRL_DEBUG", "1")
    code, _, err = call(*WORDS, "--dir", "file/deep")
    assert code == 3
    assert "Traceback" in err


def test_an_error_of_no_path_is_not_said_to_be_a_disk_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(words: list[str]) -> list[str]:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("flashrl_cli.cli.app._words", refused)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 70
    err = capsys.readouterr().err
    assert "ConnectionRefusedError: [Errno 111] Connection refused" in err
    assert "disk" not in err.splitlines()[-1]


def test_a_second_benchmark_waits_for_the_first(
    workers: Workers, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an engine starts; what it planned while the first held the machine is planned anew."""
    planned, inside, held = [], threading.Event(), threading.Event()
    plan = requests.plan

    def noted(asked: requests.Asked) -> requests.Request:
        planned.append(len(workers.asked))
        return plan(asked)

    def first() -> None:
        with files.alone(tmp_path / "runs" / ".bench", lambda: None):
            inside.set()
            held.wait(20)

    def waiting(output: Output, folder: Path) -> None:
        say(output, folder)
        held.set()

    monkeypatch.setattr(requests, "plan", noted)
    monkeypatch.setattr("flashrl_cli.cli.bench._say_waiting", waiting)
    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(20)
    code, out, err = call(*WORDS)
    thread.join(20)
    assert code == 0
    assert "int8 gives" in out
    waits = f"another benchmark works in {tmp_path / 'runs' / '.bench'}: waiting for it"
    assert err.index(waits) < err.index("starting an engine")
    assert planned == [0, 0]
    planned.clear()
    assert call(*WORDS)[0] == 0
    assert len(planned) == 1
    other = call("bench", "--model", "shape:0.5b/3", "--dir", "beside")
    assert "waiting" not in other[2]


def test_bad_input_is_refused_without_waiting(workers: Workers, call: Call, tmp_path: Path) -> None:
    with files.alone(tmp_path / "runs" / ".bench", lambda: None):
        code, _, err = call(*WORDS, "--rollout", "int9")
    assert code == 2
    assert "waiting" not in err

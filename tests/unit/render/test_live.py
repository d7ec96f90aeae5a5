"""A run as a person, a log and a program see it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from flashrl_cli.render import live
from flashrl_cli.render.live import JsonDisplay, LiveDisplay, PlainDisplay, describe, display_for, eta
from flashrl_cli.render.output import Output
from flashrl_cli.verl.metrics import LIVE, METRICS, NAMES, StepMetrics, read_step
from tests.unit.runs.on_disk import by_staleness, handshake

DATA: dict[str, float | None] = {
    "critic/score/mean": 0.25,
    "response_length/mean": 15.04,
    "rollout_corr/kl": 0.00212,
    "rollout_corr/rollout_is_mean": 0.9994,
    "rollout_corr/rollout_is_ratio_fraction_high": 0.0123,
    "timing_s/step": 10.0,
    "timing_s/gen": 3.21,
    "timing_s/update_weights": 0.5,
}


def step(number: int, **more: float | None) -> StepMetrics:
    return read_step(number, DATA | {key.replace("__", "/"): value for key, value in more.items()})


def drawn(display: LiveDisplay, *, width: int = 140, height: int = 40) -> str:
    console = Console(record=True, width=width, height=height, file=io.StringIO())
    console.print(display)
    return console.export_text()


def test_describe() -> None:
    one = "int8 in 1 rollout worker: 14 of 15 linear layers, Int8Kernel, refit 0.12 s"
    assert describe([handshake()]) == one
    assert describe([handshake(), handshake()]).startswith("int8 in 2 rollout workers: ")
    assert "Int8Kernel, logits in fp32, refit" in describe([replace(handshake(), lm_head="fp32")])
    more = replace(handshake(), kv_cache="fp8", lm_head="fp32", smoothed=12)
    assert "Int8Kernel, KV cache in fp8, logits in fp32, 12 tensors smoothed, refit" in describe([more])
    rotated = describe([replace(handshake(), rotation=64)])
    assert "Int8Kernel, inputs rotated by blocks of 64, refit" in rotated
    mixed = describe([handshake("bf16"), handshake(), handshake()])
    assert mixed.startswith("int8 in 2 rollout workers and bf16 in 1: 14 of ")
    assert describe([handshake("bf16")]) == "bf16 in 1 rollout worker: Int8Kernel, refit 0.12 s"


@pytest.mark.parametrize(
    ("paces", "left", "text"),
    [([], 5, "–"), ([10.0, 20.0], 4, "1:00"), ([1.0], 9, "0:09"), ([100.0], 37, "1:01:40"), ([10.0], 0, "0:00")],
)
def test_eta(paces: list[float], left: int, text: str) -> None:
    assert eta(paces, left) == text


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay(Output(), None)
    display.phase("loading the policy")
    display.proven([handshake()])
    display.step(step(0))
    display.expect(20)
    display.step(step(5, **{"val-core__openai__gsm8k__acc__mean@1": 0.5}))
    display.tick()
    out, err = capsys.readouterr()
    assert err.splitlines() == ["loading the policy …", f"proven: {describe([handshake()])}"]
    first, second = out.splitlines()
    assert first == "step 0/?  reward 0.250  length 15.0  KL 0.0021  w mean 0.999  cut % 1.23%  s/step 10.0"
    assert second.startswith("step 5/20  accuracy 0.500  reward 0.250")


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = JsonDisplay(Output(json_mode=True), None)
    display.expect(20)
    display.phase("loading the policy")
    display.proven([handshake()])
    display.step(step(1))
    display.tick()
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert [event["schema_version"] for event in events] == [1, 1, 1]
    phase, proof, done = events
    assert (phase["event"], phase["doing"]) == ("phase", "loading the policy")
    assert (proof["event"], proof["workers"][0]["quantized_layers"]) == ("proof", 14)
    assert (done["event"], done["step"], done["total"], done["kl"]) == ("step", 1, 20, 0.00212)
    assert done["seconds"] == {"generate": 3.21, "refit": 0.5}
    assert done["grad_norm"] is None
    assert {"accuracy", "reward", "weight_mean", "tokens_per_s"} <= done.keys()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]

    class Clock:
        def monotonic(self) -> float:
            return now[0]

    monkeypatch.setattr(live, "time", Clock())
    return now


def test_live_display_before_the_first_step(clock: list[float]) -> None:
    display = LiveDisplay("my-run", 20)
    display.phase("loading the policy")
    clock[0] += 75
    text = drawn(display)
    assert "my-run" in text
    assert "⏵ loading the policy (75 s) · 1:15 elapsed" in text
    assert "left" not in text
    assert "✓" not in text


def test_live_display_shows_rows_phases_proof_and_time_left(clock: list[float]) -> None:
    display = LiveDisplay("my-run", None)
    display.expect(20)
    display.proven([handshake()])
    display.step(step(1, timing_s__step=8.0))
    display.step(step(2, timing_s__step=12.0))
    clock[0] += 4
    lines = [line.rstrip() for line in drawn(display).splitlines()]
    assert lines[0].strip() == "my-run"
    heading = next(line for line in lines if "reward" in line)
    assert [one.name for one in LIVE if one.heading not in heading] == ["codes_changed"], "no engine has 8-bit weights"
    assert "accuracy" not in heading
    rows = [line.split() for line in lines if "/20" in line]
    assert rows[0] == ["1/20", "0.250", "15.0", "0.0021", "0.999", "–", "–", "1.23%", "–", "–", "–", "8.0"]
    assert (rows[1][0], rows[1][-1]) == ("2/20", "12.0")
    assert "s/step by phase: generate 3.2  refit 0.5" in lines
    assert f"✓ {describe([handshake()])}" in lines
    assert lines[-1] == "⏵ step 3 (4 s) · 0:04 elapsed · 3:00 left"


@pytest.mark.parametrize(("height", "rows"), [(40, live.ROWS), (12, 4)])
def test_live_display_keeps_the_last_steps_that_fit(height: int, rows: int, clock: list[float]) -> None:
    display = LiveDisplay("my-run", 100)
    for number in range(1, 20):
        display.step(step(number))
    text = drawn(display, height=height)
    assert len(text.splitlines()) <= height
    assert [line.split()[0] for line in text.splitlines() if "/100" in line] == [
        f"{number}/100" for number in range(20 - rows, 20)
    ]


def test_live_display_shows_what_arrived_where_it_was_compared(clock: list[float]) -> None:
    display = LiveDisplay("my-run", None)
    display.step(step(1))
    display.step(step(2, refit__codes_changed=0.00012))
    lines = drawn(display).splitlines()
    assert any(METRICS["codes_changed"].heading in line for line in lines)
    assert ["0.012%" in line for line in lines if "/?" in line] == [False, True]


def test_live_display_shows_accuracy_where_there_is_one(clock: list[float]) -> None:
    display = LiveDisplay("my-run", None)
    display.step(step(4))
    display.step(step(5, **{"val-core__a__acc__mean@1": 0.75}))
    text = drawn(display)
    assert "accuracy" in text
    assert "0.750" in text
    assert "5/?" in text
    assert "· – left" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 160])
def test_live_display_fits_the_terminal(width: int, clock: list[float]) -> None:
    display = LiveDisplay("my-run", 1000)
    for number in range(1, 20):
        metrics = dict.fromkeys(NAMES.values(), 12.345) | {"val-core/a/acc/mean@1": 0.5}
        display.step(read_step(number, metrics))
    lines = drawn(display, width=width).splitlines()
    heading = next(line for line in lines if "reward" in line)
    assert len(heading.rstrip()) <= width
    assert "…" not in heading
    assert {"step", "accuracy", "reward", "s/step"} <= set(heading.split()) or width == 40
    assert ("grad" in heading) == (width >= 140)


def test_ticks_redraw(clock: list[float]) -> None:
    display = LiveDisplay("my-run", None)
    display.tick()
    calls: list[int] = []
    display.redraw = lambda: calls.append(1)
    display.tick()
    assert calls == [1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_reader_gets_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with display_for(Output(json_mode=True), title="r", total=2) as display:
        assert isinstance(display, JsonDisplay)
    with display_for(Output(), title="r", total=2) as display:
        assert isinstance(display, PlainDisplay)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with display_for(Output(), title="the title", total=2) as display:
        assert isinstance(display, LiveDisplay)
        display.step(step(1))
        display.tick()
    written: Any = terminal.getvalue()
    assert "the title" in written
    assert "1/2" in written
    monkeypatch.setenv("CI", "1")
    with display_for(Output(), title="r", total=2) as display:
        assert isinstance(display, PlainDisplay)


def test_the_end_of_a_run_that_is_watched(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    PlainDisplay(Output(), 20).over("failed", exit_code=1, error="out of memory")
    JsonDisplay(Output(json_mode=True), 20).over("done", exit_code=0)
    out, err = capsys.readouterr()
    assert err == "failed (exit code 1): out of memory\n"
    assert json.loads(out) == {"schema_version": 1, "event": "end", "state": "done", "exit_code": 0, "error": None}
    display = LiveDisplay("my-run", 20, elapsed_s=3600)
    display.step(step(1))
    assert "60:00 elapsed" in drawn(display)
    display.over("stopped", exit_code=130)
    assert "stopped (exit code 130)" in drawn(display)
    assert "elapsed" not in drawn(display)


def test_a_warning_reaches_every_reader(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    output = Output(json_mode=False)
    PlainDisplay(output, 2).warn("no reward varies")
    assert "warning: no reward varies" in capsys.readouterr().err
    JsonDisplay(Output(json_mode=True), 2).warn("no reward varies")
    event = json.loads(capsys.readouterr().out)
    assert (event["event"], event["text"]) == ("warning", "no reward varies")
    display = LiveDisplay("r", 2)
    display.warn("no reward varies")
    assert "warning: no reward varies" in drawn(display)


def test_columns_by_staleness_are_those_of_asynchronous_runs(capsys: pytest.CaptureFixture[str]) -> None:
    display = LiveDisplay("r", 3)
    display.step(step(1))
    assert "@" not in drawn(display)
    display.step(step(2, **by_staleness({0: 0.0005})))
    display.step(step(3, **by_staleness({0: 0.0004, 1: 0.0301})))
    text = drawn(display, width=200)
    for said in ("KL@0", "KL@1", "w mean@0", "w mean@1", "0.0005", "0.0301", "0.997"):
        assert said in text
    assert drawn(display, width=110).count("KL@") == 2, "other columns are left out first"
    assert "w mean@" not in drawn(display, width=110)
    PlainDisplay(Output(), 3).step(step(3, **by_staleness({0: 0.0004, 1: 0.0301})))
    assert "KL@0 0.0004  KL@1 0.0301  w mean@0 1.000  w mean@1 0.997" in capsys.readouterr().out
    JsonDisplay(Output(json_mode=True), None).step(step(3, **by_staleness({1: 0.0301})))
    assert json.loads(capsys.readouterr().out)["kl@1"] == 0.0301

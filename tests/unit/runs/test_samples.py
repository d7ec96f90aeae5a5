"""`flashrl runs samples`: which of the kept responses are shown, in the terminal, as JSON and in the report."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict

import pytest

from flashrl_cli.cli.app import main
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.plugins import samples
from flashrl_cli.render.examples import sample_lines
from flashrl_cli.render.run_report import report_document, report_page
from flashrl_cli.runs import store
from flashrl_cli.runs.samples import shown
from flashrl_cli.runs.summary import summarize
from tests.unit.plugins.test_samples import sample
from tests.unit.runs.on_disk import attempt, make

STEPS = {
    1: [sample(1, reward=0.5, length=3), sample(1, reward=0.1, length=16, truncated=True)],
    2: [sample(2, reward=0.2, length=9), sample(2, reward=1.0, length=2)],
}


@pytest.fixture
def run() -> store.Run:
    """A run of two attempts, the second of which went on from step 1."""
    paths = make("r", attempt(1), attempt(2, resumed_from=1))
    for step, kept in STEPS.items():
        samples.write(paths.attempt(1).samples, step, kept)
    return store.find(paths.name)


def test_the_last_step_is_shown(run: store.Run) -> None:
    found = shown(run)
    assert found.steps == (2,)
    assert list(found.samples) == STEPS[2]
    assert list(shown(run, count=1).samples) == STEPS[2][:1]
    assert list(shown(run, step=1).samples) == STEPS[1]


def test_orders_take_all_steps(run: store.Run) -> None:
    assert [one.reward for one in shown(run, order="worst").samples] == [0.1, 0.2, 0.5, 1.0]
    assert [one.length for one in shown(run, order="longest").samples] == [16, 9, 3, 2]
    assert [one.length for one in shown(run, order="truncated").samples] == [16]
    with pytest.raises(NothingMatched, match="none of the 2 kept responses is truncated"):
        shown(run, step=2, order="truncated")


def test_what_a_resume_undid_is_left_out(run: store.Run) -> None:
    samples.write(run.paths.attempt(2).samples, 2, [sample(2, reward=0.9)])
    samples.write(run.paths.attempt(1).samples, 3, [sample(3)])
    found = shown(run, order="worst")
    assert found.steps == (1, 2)
    assert [one.reward for one in found.samples] == [0.1, 0.5, 0.9]


def test_a_run_without_responses_says_why(run: store.Run) -> None:
    for path in samples.steps_in(run.paths.attempt(1).samples).values():
        path.unlink()
    with pytest.raises(NothingMatched, match="kept no responses"):
        shown(run)


def test_a_step_that_was_not_kept(run: store.Run) -> None:
    with pytest.raises(InputError, match="no responses of step 7") as caught:
        shown(run, step=7)
    assert caught.value.hint == "there are steps 1 to 2"


def test_a_damaged_step_is_reported_beside_the_others(run: store.Run) -> None:
    samples.file_of(run.paths.attempt(1).samples, 2).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        shown(run)
    found = shown(run, order="worst")
    assert list(found.samples) == sorted(STEPS[1], key=lambda one: one.reward)
    assert "step_000002.json is damaged" in found.damaged[0]


def test_the_lines_cannot_control_the_terminal() -> None:
    data = asdict(sample(response="a\x1b[31mred", weight=1.2345, weight_max=3.0, truncated=True))
    lines = list(sample_lines(data, width=100, full=False))
    heading = " ".join(" ".join(lines[:2]).split())
    assert heading.startswith("── step 1 · reward 1 · 6 tokens, as many as a response may have · advantage 0.5 · ")
    assert heading.endswith("weight 1.234, at most 3 · random")
    assert "    a\\x1b[31mred" in lines
    assert "truth: 2" in lines


def test_the_command(run: store.Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashrl", "runs", "samples", run.name, *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    code, out, _ = call("--json", "--worst", "--n", "2")
    assert code == 0
    assert [one["reward"] for one in json.loads(out)["samples"]] == [0.1, 0.2]
    code, out, _ = call()
    assert "── step 2 · reward 0.2 · 9 tokens" in out
    code, _, err = call("--worst", "--longest")
    assert code == 2
    assert "--worst and --longest exclude each other" in err


def test_the_report_has_the_responses_of_the_last_step(run: store.Run) -> None:
    pytest.importorskip("jinja2")
    samples.write(run.paths.attempt(2).samples, 2, [sample(2, response="<script>alert(1)</script>", reward=0.25)])
    found = summarize(run)
    assert [one["reward"] for one in report_document(found, lambda *_: [])["samples"]] == [0.25]
    page = report_page(found, lambda *_: [])
    assert "&lt;script&gt;alert(1)" in page
    assert re.search(r"<summary>reward 0\.250*, 6 tokens", page)

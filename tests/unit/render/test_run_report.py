"""The report of a run: whole, with anything missing or damaged, and without secrets."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from typing import Any

import pytest

from flashrl_cli.cli.runs import _changed
from flashrl_cli.contract import write_handshake
from flashrl_cli.paths import RunPaths
from flashrl_cli.render.run_report import report_document, report_page
from flashrl_cli.runs.store import Phase, find
from flashrl_cli.runs.summary import summarize
from tests.unit.runs import test_speed
from tests.unit.runs.on_disk import (
    a_run,
    attempt,
    by_staleness,
    handshake,
    kept,
    log,
    plan,
    training,
    validation,
    write_record,
)

SHAKE = handshake(kernel="CutlassInt8")
SECRETS = ("hf_abcdefghijklmnopqrstuvwxyz0123456789", "verysecret")


def with_secrets(run: RunPaths, number: int, plan: dict[str, Any], token: str, key: str) -> None:
    """Write a plan from when a preset's variables might hold secrets."""
    secrets = {"HF_TOKEN": token, "WANDB_API_KEY": key}
    plan["spec"]["env"] = secrets
    plan["env"] |= secrets
    plan["overrides"] += [
        f"+ray_kwargs.ray_init.runtime_env.env_vars.{name}={value}" for name, value in secrets.items()
    ]
    run.attempt(number).plan.write_text(json.dumps(plan))


@pytest.fixture
def whole() -> RunPaths:
    """A run of two attempts with everything that attempts leave."""
    run = a_run("whole")
    for number, steps in ((1, "trainer.steps=3"), (2, "trainer.steps=4")):
        with_secrets(run, number, plan(run, number, steps), *SECRETS)
        write_handshake(run.attempt(number).plugins, SHAKE)
    log(run, 1, {0: validation(0.1), 1: training(0.1), 2: training(0.2), 3: training(0.3)})
    log(run, 2, {3: training(0.4), 4: {**training(0.5), **validation(0.75)}})
    began = [f"2026-03-01T10:00:{second}+00:00" for second in ("00", "20", "30")]
    phases = tuple(Phase(name=f"phase {n}", began=at) for n, at in enumerate(began))
    words = ("flashrl", "train", "--set", f"env.HF_TOKEN={SECRETS[0]}")
    failed = {"status": "failed", "exit_code": 1, "error": "a GPU ran out of memory", "hint": "lower it"}
    first = attempt(
        1, phases=phases, last_step=3, argv=words, versions={"verl": "0.9.1"}, git={"commit": "abc"}, **failed
    )
    second = attempt(
        2,
        resumed_from=2,
        last_step=4,
        total_steps=4,
        versions={"verl": "0.9.2"},
        git={"commit": "abc", "dirty": True},
        set_aside=("global_step_3: its save did not finish",),
    )
    write_record(run, [first, second])
    return run


def report(run: RunPaths) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        json.dumps(report_document(summarize(find(run.name)), _changed), allow_nan=False)
    )
    assert found["schema_version"] == 1
    return found


def page(run: RunPaths) -> str:
    return report_page(summarize(find(run.name)), _changed)


def test_the_document_holds_it_all(whole: RunPaths) -> None:
    found = report(whole)
    assert (found["name"], found["state"], found["preset"], found["notes"]) == ("whole", "done", "demo", [])
    assert found["totals"]["accuracy"] == [{"step": 0, "value": 0.1}, {"step": 4, "value": 0.75}]
    assert found["totals"]["steps"] == 4
    assert [(start["attempt"], start["seconds"]) for start in found["starts"]] == [(1, 30)]
    assert {spent["what"] for spent in found["step"]} == {"generate", "actor", "other"}
    assert found["mismatch"]["values"]["kl"] == {"mean": 1, "least": 1, "greatest": 1, "last": 1}
    assert found["mismatch"]["advice"]["cap"] == 2
    assert [(handshake["attempt"], handshake["kernel"]) for handshake in found["proof"]] == [
        (1, "CutlassInt8"),
        (2, "CutlassInt8"),
    ]
    assert [one["state"] for one in found["attempts"]] == ["failed", "done"]
    assert {"key": "correction.cap", "value": "2.0", "origin": "--tis"} in found["configuration"]
    assert found["versions"] == {"verl": "0.9.2"}


def test_what_slows_a_step_is_in_the_page() -> None:
    run = test_speed.with_plan(test_speed.measured_run())
    assert [one["cause"] for one in report(run)["speed"]["slow"]] == ["mfu", "padding", "passes"]
    text = page(run)
    assert "What slows a step" in text
    assert "0.5 %<small>of the GPU&#39;s peak arithmetic (MFU)" in text or "0.5 %<small>of the GPU's peak" in text
    assert "<code>--set model.packing=true" in text


def test_what_changed_between_attempts(whole: RunPaths) -> None:
    (change,) = report(whole)["changes"]
    assert (change["before"], change["after"]) == (1, 2)
    assert [(one["key"], one["before"], one["after"]) for one in change["differences"]] == [
        ("trainer.steps", "3", "4"),
        ("verl", "0.9.1", "0.9.2"),
        ("git dirty", "–", "true"),
    ]


def test_no_secret_is_told_anywhere(whole: RunPaths) -> None:
    others = ("another-hf_secret", "other-key")
    with_secrets(whole, 3, plan(whole, 3), *others)
    for text in (json.dumps(report(whole)), page(whole)):
        assert "HF_TOKEN" in text
        assert not [secret for secret in (*SECRETS, *others) if secret in text]


class Elements(HTMLParser):
    """Tags, ids and what an element stands open at the end of a page."""

    VOID = ("meta", "link", "img", "br", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_well_formed_file_that_says_what_the_document_does(whole: RunPaths) -> None:
    text = page(whole)
    found = Elements(text)
    assert not found.open
    assert len(found.ids) == len(set(found.ids))
    assert not {"script", "link", "img", "iframe"} & found.tags
    assert not re.search(r"https?://|@import|\bsrc=|url\((?!#)", text)
    assert len(text.encode()) < 500_000
    for said in (
        "a GPU ran out of memory",
        "lower it",
        "CutlassInt8",
        "its save did not finish",
        "What attempt 2 changed",
        '<span class="state done">done</span>',
        "4 of 4",
    ):
        assert said in text


def test_what_others_wrote_is_escaped() -> None:
    run = a_run("a<b>&")
    evil = "<script>alert(1)</script>"
    plan(run, 1, f"description={evil}", f"env.X={evil}")
    log(run, 1, {1: training()})
    write_record(run, [attempt(error=evil, hint=evil, host=evil, argv=(evil,), versions={evil: evil})], project=evil)
    text = page(run)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6
    assert "a&lt;b&gt;&amp;" in text


def test_a_report_is_of_what_there_is() -> None:
    run = a_run()
    found = report(run)
    assert found["state"] == "unknown"
    nothing = ["There is no record (run.json): state, times and causes are not known.", "No step was logged."]
    assert found["notes"] == nothing
    assert "No step was logged." in page(run)
    log(run, 1, {1: training(), 2: training(), 4: training()})
    text = page(run)
    assert text.count("<svg") >= 6
    assert [(one["number"], one["state"], one["ran_s"]) for one in report(run)["attempts"]] == [(1, "unknown", None)]
    assert "Attempt 1 left no plan." in text
    assert "Steps without metrics: 3." in text
    log(run, 1, {step: training(step % 7, entropy=step % 11) for step in range(5, 3001)})
    assert len(page(run).encode()) < 500_000, "a long run is a small page"


def test_an_attempt_that_failed_before_a_step() -> None:
    run = a_run()
    plan(run, 1)
    write_record(run, [attempt(status="failed", error="no GPU")])
    text = page(run)
    assert "no GPU" in text
    assert "<svg" not in text


@pytest.mark.parametrize("damage", ["{", "[]", '{"schema_version": 99}'])
def test_damaged_files_are_told_and_left_out(damage: str, whole: RunPaths) -> None:
    whole.record.write_text(damage)
    whole.attempt(1).plan.write_text(damage)
    next(whole.attempt(2).plugins.iterdir()).write_text("{")
    found = report(whole)
    assert found["state"] == "unknown"
    assert found["totals"]["steps"] == 4
    assert [note for note in found["notes"] if "record is left out" in note]
    assert [note for note in found["notes"] if "plan of attempt 1 is left out" in note]
    assert [note for note in found["notes"] if "handshake of attempt 2 is damaged" in note]
    assert [handshake["attempt"] for handshake in found["proof"]] == [1]
    assert "<svg" in page(whole)


def test_a_plan_from_before_plans_held_values(whole: RunPaths) -> None:
    old = plan(whole, 1)
    for name in ("spec", "origins"):
        del old[name]
    whole.attempt(1).plan.write_text(json.dumps(old))
    (change,) = report(whole)["changes"]
    assert "trainer.total_training_steps" in {one["key"] for one in change["differences"]}


def test_the_records_proof_serves_where_the_files_are_gone(whole: RunPaths) -> None:
    for number in (1, 2):
        next(whole.attempt(number).plugins.iterdir()).unlink()
    write_record(whole, [attempt(1, proof=(asdict(SHAKE),)), attempt(2, proof=({"pid": 9},))])
    found = report(whole)
    assert found["proof"] == [{"attempt": 1, **asdict(SHAKE)}]
    assert "A handshake of attempt 2 is damaged." in found["notes"]
    assert "CutlassInt8" in page(whole)


def test_kept_log_ratios_are_a_table_and_pictures(whole: RunPaths) -> None:
    assert report(whole)["correction"] is None
    assert "Other corrections" not in page(whole)
    kept(whole, 2, 3, 4)
    found = report(whole)["correction"]
    assert (found["steps"], found["own"]) == ([3, 4], "tis 2")
    text = page(whole)
    assert "Other corrections" in text
    assert text.count('id="correction') >= 3
    assert all(row["name"] in text for row in found["corrections"])
    assert all(source in text for source in found["sources"])


def test_damaged_log_ratios_are_noted(whole: RunPaths) -> None:
    kept(whole, 2, 4)
    (file,) = whole.attempt(2).log_ratios.iterdir()
    file.write_bytes(b"")
    assert report(whole)["correction"] is None
    assert any("step_000004.npz is damaged" in note for note in report(whole)["notes"])


def test_staleness_is_a_table_and_pictures(whole: RunPaths) -> None:
    assert "By staleness" not in page(whole)
    assert "by_staleness" not in report(whole)["mismatch"]["advice"]
    log(whole, 2, {5: {**training(0.5), **by_staleness({0: 0.001, 1: 0.02, "fresh": 0.002})}})
    found = report(whole)["mismatch"]["advice"]["by_staleness"]
    assert [(one["staleness"], one["tokens"]) for one in found] == [(0, 1000), (1, 1000), (None, 1000)]
    text = page(whole)
    assert not Elements(text).open
    for said in ("By staleness", "staleness 0", "staleness 1", "scored again", "effective sample size, by staleness"):
        assert said in text
    assert text.count('id="staleness') >= 5

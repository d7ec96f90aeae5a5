"""Runs as people see them."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from datetime import UTC, datetime

import pytest

from flashrl_cli.render import figure, run_tables
from flashrl_cli.render.output import Output
from flashrl_cli.render.run_tables import ago, aligned, listing
from flashrl_cli.runs.store import Phase, find
from flashrl_cli.runs.summary import Row, summarize
from tests.unit.render.test_live import DATA
from tests.unit.runs import on_disk, test_speed

ROW = Row(
    name="tiny-int8-tis2",
    preset="tiny",
    state="running",
    step=3,
    total_steps=20,
    reward=0.5,
    accuracy=None,
    attempts=2,
    changed=on_disk.THEN,
    run_bytes=1_000_000,
    checkpoint_bytes=2_000_000,
    problem=None,
)


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("2026-03-01T11:59:01+00:00", "59 s"),
        ("2026-03-01T11:57:00+00:00", "3 min"),
        ("2026-03-01T13:00:00+02:00", "60 min"),
        ("2026-03-01T09:00:00+00:00", "3 h"),
        ("2026-02-01T12:00:00+00:00", "28 d"),
        ("2026-03-01T12:00:05+00:00", "0 s"),
    ],
)
def test_ages(moment: str, text: str) -> None:
    assert ago(moment, datetime(2026, 3, 1, 12, tzinfo=UTC)) == text


def test_columns_are_aligned() -> None:
    assert aligned([("a", "bb", "c"), ("aaa", "b", "")], right=(1,)) == ["a    bb  c", "aaa   b"]


def test_a_list() -> None:
    unknown = dataclasses.replace(
        ROW, name="old", preset=None, state=None, step=None, total_steps=None, reward=None, attempts=0
    )
    heading, first, second = listing([ROW, unknown], 160)
    assert heading.split() == list(run_tables.COLUMNS)
    assert first.split()[:7] == ["tiny-int8-tis2", "tiny", "running", "3/20", "0.500", "–", "2"]
    assert first.endswith("3 MB")
    assert second.split()[:7] == ["old", "–", "?", "–", "–", "–", "0"]


@pytest.mark.parametrize(
    ("width", "gone"), [(80, set()), (70, {"att."}), (60, {"att.", "preset"}), (54, {"att.", "preset", "acc."})]
)
def test_a_narrow_list_has_fewer_columns(width: int, gone: set[str]) -> None:
    lines = listing([ROW], width)
    assert max(map(len, lines)) <= width
    assert set(run_tables.COLUMNS) - set(lines[0].split()) == gone


def test_what_fits_nowhere_keeps_its_name_and_state() -> None:
    assert {"name", "state", "step"} <= set(listing([ROW], 10)[0].split())


def shown(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    run_tables.show(Output(), summarize(find(name)))
    out, err = capsys.readouterr()
    return out, err


@pytest.fixture
def demo() -> None:
    phases = (Phase(name="starting Ray", began=on_disk.THEN), Phase(name="sampling responses", began=on_disk.LATER))
    failed = on_disk.attempt(1, status="failed", exit_code=1, error="out of memory " * 20, hint="use less", last_step=2)
    done = on_disk.attempt(
        2, resumed_from=2, phases=phases, proof=(asdict(on_disk.handshake()),), set_aside=("global_step_3: torn",)
    )
    run = on_disk.make("demo", failed, done, checkpoints=5000)
    on_disk.log(run, 1, {1: DATA, 2: DATA})
    on_disk.log(run, 2, {4: DATA})


@pytest.mark.usefixtures("demo")
def test_a_run_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown("demo", capsys)
    assert "demo (demo), done, step 4/?" in out
    assert "(5 kB)" in out
    assert "holes        1 step below the last without metrics: 3" in out
    assert "set aside    global_step_3: torn" in out
    table = [line.split() for line in out.splitlines()]
    assert ["1", "failed", "2026-03-01", "1", "h", "30", "min", "2", "–", "1"] in [
        r[:3] + r[4:] for r in table if len(r) > 8
    ]
    assert "attempt 1: out of memory" in out
    assert "hint: use less" in out
    assert "starting Ray  1 h 30 min" in out
    assert "generate  3.2 s  32%" in out
    assert "proven: int8 in 1 rollout worker: 14 of 15 linear layers" in out
    assert "●" in out
    assert "rollout against trainer" in out
    assert max(map(len, out.splitlines())) <= 160
    assert err == ""


def test_causes_of_slow_steps_are_shown_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    run = test_speed.measured_run()
    assert "slows a step" not in shown(run.name, capsys)[0], "without a plan"
    test_speed.with_plan(run)
    out, _ = shown(run.name, capsys)
    assert "a step took, as median of the last 3, 1 min" not in out
    assert "a step took, as median of the last 3, 76 s" in out
    assert "actor      46.0 s  61%" in out
    words = " ".join(out.split())
    assert "policy update at 0.5% of the GPU's peak arithmetic (MFU), 2,826 tokens a second and device" in words
    assert "what slows a step policy update: 61% of a step" in words
    assert "padding is computed like tokens: --set" in words
    assert max(map(len, out.splitlines())) <= 160


@pytest.mark.usefixtures("demo")
def test_without_plotext_it_is_said_and_the_rest_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "installed", lambda _: False)
    out, err = shown("demo", capsys)
    assert "plotext is not installed" in err
    assert "●" not in out
    assert "rollout against trainer" in out


def test_a_run_of_which_nothing_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    on_disk.a_run("empty")
    out, _ = shown("empty", capsys)
    assert "preset unknown" in out
    assert "state unknown" in out
    assert "no attempt" in out
    assert "(none)" in out


def test_a_damaged_record_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    on_disk.make("broken", on_disk.attempt()).record.write_text("{")
    assert "is no run record" in shown("broken", capsys)[0]


def test_a_run_in_full_compares_corrections(capsys: pytest.CaptureFixture[str]) -> None:
    run = on_disk.make("kept", on_disk.attempt(1))
    on_disk.planned(run, 1, correction={"kind": "icepop", "cap": 3.0, "lower": 0.5})
    on_disk.kept(run, 1, 1, 2)
    out, _ = shown("kept", capsys)
    assert "other corrections, replayed on 80 responses of steps 1 to 2" in out
    names = [line.split("  ")[0] for line in out.partition("other corrections")[2].splitlines()]
    assert "icepop 0.5 to 3 (the run)" in names
    firsts = [name.split()[0] for name in names if name.split()[:1] and name.split()[0] in {"none", "tis", "seq-tis"}]
    assert sorted(firsts) == ["none", "seq-tis", "tis"], "one of each kind"


@pytest.mark.usefixtures("demo")
def test_a_run_that_kept_nothing_compares_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "other corrections" not in shown("demo", capsys)[0]


def test_a_run_in_full_has_a_table_by_staleness(capsys: pytest.CaptureFixture[str]) -> None:
    run = on_disk.make("stale", on_disk.attempt(1))
    on_disk.planned(run, 1, correction={"kind": "tis", "cap": 2.0})
    whole = on_disk.training(kl=0.01, kl_k3=0.01, chi2=0.02, weight_mean=1.0, weight_max=1.5, weight_std=0.1)
    on_disk.log(run, 1, {1: {**whole, **on_disk.by_staleness({0: 0.001, 1: 0.02, "fresh": 0.002})}})
    on_disk.kept(run, 1, 1, stale=True)
    out, _ = shown("stale", capsys)
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert rows["staleness"][:4] == ["staleness", "share", "tokens", "KL"]
    assert rows["0"][:4] == ["0", "50", "%", "1,000"]
    assert rows["1"][4:6] == ["0.02", "0.02"]
    assert "scored again" in out
    assert "90 % of the KL comes from it" in " ".join(out.split())


@pytest.mark.usefixtures("demo")
def test_a_synchronous_run_has_no_table_by_staleness(capsys: pytest.CaptureFixture[str]) -> None:
    assert "staleness" not in shown("demo", capsys)[0]

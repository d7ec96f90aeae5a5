"""`flashrl runs`, as people and programs call it."""

from __future__ import annotations

import inspect
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from flashrl_cli import paths
from flashrl_cli.cli import runs as commands
from flashrl_cli.cli.app import app, main
from flashrl_cli.machine import software
from flashrl_cli.render import figure
from flashrl_cli.runs import store
from flashrl_cli.runs.control import Follower
from flashrl_cli.runs.curves import SMOOTHING
from flashrl_cli.runs.saved import DOOMED, hide, set_aside
from flashrl_cli.verl.metrics import PLOTTED
from tests.run_lab import Lab, lab
from tests.saved_files import saved_step
from tests.unit.runs import sampled
from tests.unit.runs.on_disk import REWARD, a_run, attempt, kept, log, make, planned, training

__all__ = ["lab"]

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`call(*words)` runs `flashrl runs WORDS` in this process: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashrl", "runs", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def document(call: Call) -> Callable[..., dict[str, Any]]:
    """`document(*words)` is what a command prints with --json."""

    def run(*words: object) -> dict[str, Any]:
        code, out, _ = call(*words, "--json")
        found: dict[str, Any] = json.loads(out)
        assert (code, found["schema_version"]) == (0, 1)
        return found

    return run


Document = Callable[..., dict[str, Any]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`answer("y\\n")` is what a person at a terminal types next."""

    def typed(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    return typed


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        *((words, 4, "did you mean demo?") for words in (("show", "dmo"), ("watch", "dmo"), ("stop", "dmo"))),
        *((words, 4, "did you mean demo?") for words in (("rm", "dmo"), ("plot", "demo", "dmo"), ("report", "dmo"))),
        *(((word, "../demo"), 2, "not the name of a run") for word in ("show", "watch", "stop", "rm", "report")),
        (("checkpoints", "dmo"), 4, "did you mean demo?"),
        (("checkpoints", ""), 2, "not the name of a run"),
        (("checkpoints", "demo", "--keep", "all"), 2, "--keep last:3"),
        (("checkpoints", "demo", "--yes"), 2, "belong to --keep"),
        (("checkpoints", "demo", "--dry-run"), 2, "belong to --keep"),
        (("export", "demo", "best", "out", "--public"), 2, "--public belongs to --push"),
        (("export", "demo", "9", "out"), 4, "no weights of step 9"),
        (("export", "demo", "last", "out"), 2, "neither a number"),
        (("export", "demo", "best", "out", "--push", "a/b/c"), 2, "not the name of a repository"),
        (("plot", "demo", "--metric", "rewrd"), 2, "did you mean reward"),
        *((("plot", "demo", f"--smooth={weight}"), 2, "--smooth") for weight in ("-0.1", "1", "nan", "inf")),
        *((("plot", "demo", option, "folder"), 2, "is a directory") for option in ("--png", "--html")),
    ],
)
def test_bad_input_is_an_error_and_changes_nothing(
    words: tuple[str, ...], code: int, says: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("demo", attempt(), checkpoints=10)
    log(run, 1, {1: training()})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    found, out, err = call(*words)
    assert (found, out) == (code, "")
    assert says in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


# ls, show


def test_ls(call: Call, document: Document) -> None:
    code, out, err = call("ls")
    assert (code, out) == (0, "")
    assert "no runs in" in err
    assert document("ls")["runs"] == []
    log(make("demo", attempt(last_step=2, total_steps=4)), 1, {1: REWARD})
    make("broken", attempt()).record.write_text("{")
    _, out, err = call("ls")
    assert [line.split()[0] for line in out.splitlines()] == ["name", "broken", "demo"]
    assert "warning: " in err
    assert "is no run record" in err
    broken, demo = document("ls")["runs"]
    assert [demo[key] for key in ("name", "state", "step", "total_steps", "reward")] == ["demo", "done", 2, 4, 0.5]
    assert (broken["state"], "run.json" in broken["problem"]) == (None, True)


def test_show(call: Call, document: Document) -> None:
    run = make("demo", attempt())
    planned(run, 1, correction={"cap": 2.0})
    log(run, 1, {1: sampled.logged(sampled.sample(0.15), 2)})
    assert "The cap fits" in call("show", "demo")[1]
    found = document("show", "demo")
    assert (found["run"]["name"], found["record"]["preset"], found["mismatch"]["verdict"]) == ("demo", "demo", "keep")


# watch, stop


def test_watch_ends_as_the_run_did(call: Call) -> None:
    failed: dict[str, Any] = {
        "status": "failed",
        "exit_code": 3,
        "error": "no proof",
        "hint": "take bf16",
        "total_steps": 9,
    }
    log(make("demo", attempt(**failed)), 1, {1: REWARD})
    assert call("watch", "demo") == (
        3,
        "step 1/9  reward 0.500\n",
        "failed (exit code 3): no proof\nhint: take bf16\n",
    )
    events = [json.loads(line) for line in call("watch", "demo", "--json")[1].splitlines()]
    assert [event["event"] for event in events] == ["step", "end"]


def test_watching_ends_alone(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Follower) -> None:
        raise KeyboardInterrupt

    make("demo", attempt(status="running"))
    monkeypatch.setattr(Follower, "follow", interrupt)
    monkeypatch.setattr(psutil.Process, "send_signal", lambda *_: pytest.fail("signalled"))
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signalled"))
    result = CliRunner().invoke(app, ["runs", "watch", "demo"], catch_exceptions=False)
    assert result.exit_code == 130
    assert "demo goes on" in result.stderr


def test_nothing_to_watch_without_a_record(call: Call) -> None:
    make("old")
    code, _, err = call("watch", "old")
    assert code == 2
    assert "hint: `flashrl runs show old` shows what its folders hold" in err


def test_stop(call: Call, document: Document) -> None:
    make("demo", attempt())
    assert call("stop", "demo")[:2] == (0, "demo is not running: attempt 1 is done\n")
    found = document("stop", "demo")
    assert (found["stopped"], found["state"]) == (False, "done")
    make("elsewhere", attempt(status="running", host="node7"))
    code, _, err = call("stop", "elsewhere")
    assert code == 3
    assert "node7" in err


# rm


def test_rm(call: Call, document: Document) -> None:
    one, two = make("one", attempt(), checkpoints=5000), make("two", attempt())
    _, out, err = call("rm", "one", "two", "one", "--yes")
    assert out == "removed one\nremoved two\n"
    assert str(one.checkpoints) in err
    assert "together" in err
    assert not any(path.exists() for path in (one.root, one.checkpoints, two.root))
    run = make("one", attempt(), checkpoints=5000)
    (removed,) = document("rm", "one", "--yes", "--keep-checkpoints")["removed"]
    assert (removed["name"], removed["run"], removed["checkpoints"]) == ("one", str(run.root), None)
    assert run.checkpoints.exists()


def test_rm_asks_a_person_and_takes_no_for_an_answer(call: Call, answer: Callable[[str], None]) -> None:
    run = make("one", attempt())
    answer("n\n")
    assert call("rm", "one")[0] == 1
    assert run.root.exists()
    answer("y\n")
    assert call("rm", "one")[0] == 0
    assert not run.root.exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_rm_removes_nothing_unasked(terminal: bool, call: Call, answer: Callable[[str], None]) -> None:
    run = make("one", attempt())
    if terminal:
        answer("y\n")
    code, _, err = call("rm", "one", *(["--json"] if terminal else []))
    assert (code, "--yes" in err, run.root.exists()) == (2, True, True)


def test_rm_checks_all_before_it_removes_one(call: Call) -> None:
    run = make("one", attempt())
    make("two", attempt(status="running"))
    code, _, err = call("rm", "one", "two", "--yes")
    assert (code, "two is running" in err, run.root.exists()) == (2, True, True)


# checkpoints, export


@pytest.fixture
def trained(lab: Lab) -> Lab:
    """Steps 1 to 4; the best is 1, the last is torn."""
    lab.recorded()
    lab.save(1, 2, 3, 4)
    lab.log({step: {"critic/score/mean": 1 - step / 10} for step in (1, 2, 3, 4)})
    file = lab.run.checkpoints / "global_step_4" / "actor" / "optim_world_size_2_rank_1.pt"
    file.write_bytes(file.read_bytes()[:-9])
    return lab


def test_the_table_of_checkpoints(trained: Lab, call: Call) -> None:
    set_aside(saved_step(trained.run.checkpoints, 5), "data.pt: missing")
    code, out, _ = call("checkpoints", "r")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("step state size HF weights reward age") for line in lines)
    assert any("best" in line and line.startswith("1 complete") for line in lines)
    assert any("newest" in line and line.startswith("3 complete") for line in lines)
    torn = "4 incomplete: actor/optim_world_size_2_rank_1.pt: truncated or damaged"
    assert any(torn in line and "tracked" in line for line in lines)
    assert any(line.startswith("global_step_5") and line.endswith("data.pt: missing") for line in lines)


def test_the_document_of_checkpoints(trained: Lab, document: Document) -> None:
    set_aside(saved_step(trained.run.checkpoints, 5), "torn")
    found = document("checkpoints", "r")
    assert (found["run"], found["score_by"]) == ("r", "reward")
    steps = {one["step"]: one for one in found["steps"]}
    assert [step for step, one in steps.items() if one["complete"]] == [1, 2, 3]
    assert (steps[1]["best"], steps[3]["newest"], steps[4]["tracked"]) == (True, True, True)
    assert steps[4]["problems"] == ["actor/optim_world_size_2_rank_1.pt: truncated or damaged"]
    assert steps[2]["score"] == 0.8
    assert Path(steps[2]["path"]).is_dir()
    assert found["set_aside"][0]["reason"] == "torn"


def test_a_run_without_checkpoints(lab: Lab, call: Call) -> None:
    lab.recorded()
    code, out, err = call("checkpoints", "r")
    assert (code, out) == (0, "")
    assert f"no checkpoints in {lab.run.checkpoints}" in err


def test_a_dry_run_deletes_nothing(trained: Lab, call: Call, document: Document) -> None:
    before = trained.names()
    code, out, err = call("checkpoints", "r", "--keep", "last:1", "--dry-run")
    assert (code, "best by reward" in out, "1 go, which frees" in err) == (0, True, True)
    found = document("checkpoints", "r", "--keep", "last:1", "-n")
    assert [Path(path).name for path in found["going"]] == ["global_step_2"]
    assert (found["deleted"], trained.names()) == (False, before)


def test_pruning(trained: Lab, call: Call, document: Document) -> None:
    moved = set_aside(saved_step(trained.run.checkpoints, 5), "torn")
    hide(saved_step(trained.run.checkpoints, 6), trained.run.checkpoints / DOOMED)
    assert "an interrupted prune left" in call("checkpoints", "r")[2]
    found = document("checkpoints", "r", "--keep", "last:1", "--yes")
    assert (found["deleted"], found["bytes"] > 0) == (True, True)
    assert {one["step"]: one["stays"] for one in found["steps"]}[2] == []
    left = [name for name in trained.names() if name.startswith("global")]
    assert left == ["global_step_1", "global_step_3", "global_step_4"], "the best, the newest, and the tracked one"
    assert "interrupted" not in call("checkpoints", "r")[2]
    again = document("checkpoints", "r", "--keep", "last:1", "--yes")
    assert (again["going"], again["deleted"], moved.exists()) == ([], False, True)
    assert call("checkpoints", "r", "--set-aside", "--yes")[0] == 0
    assert not moved.exists()


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_without_consent_no_checkpoint_is_deleted(flags: tuple[str, ...], trained: Lab, call: Call) -> None:
    before = trained.names()
    code, _, err = call("checkpoints", "r", "--keep", "last:1", *flags)
    assert (code, "--yes deletes" in err, trained.names()) == (2, True, before)


@pytest.mark.parametrize(("typed", "gone"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_a_person_is_asked(typed: str, gone: bool, trained: Lab, call: Call, answer: Callable[[str], None]) -> None:
    answer(typed)
    code, _, err = call("checkpoints", "r", "--keep", "last:1")
    assert (code == 0, "for good?" in err) == (gone, True)
    assert ("global_step_2" in trained.names()) is not gone


def test_a_program_is_never_asked(trained: Lab, call: Call, answer: Callable[[str], None]) -> None:
    answer("y\n")
    assert call("checkpoints", "r", "--keep", "last:1", "--json")[0] == 2
    assert "global_step_2" in trained.names()


def test_a_running_runs_checkpoints_are_left_alone(trained: Lab, call: Call) -> None:
    trained.recorded(status="running", **store.own_process())
    code, _, err = call("checkpoints", "r", "--keep", "last:1", "--yes")
    assert (code, "is running" in err, "flashrl runs stop r" in err) == (2, True, True)
    assert "global_step_2" in trained.names()
    code, _, err = call("checkpoints", "r")
    assert (code, "may be being saved" in err) == (0, True), "looking is allowed"


def test_a_record_that_points_to_a_home_is_refused(trained: Lab, call: Call, tmp_path: Path) -> None:
    data = json.loads(trained.run.record.read_text())
    (tmp_path / "global_step_1").mkdir()
    trained.run.record.write_text(json.dumps(data | {"checkpoints": str(tmp_path)}))
    code, _, err = call("checkpoints", "r", "--keep", "last:1", "--yes")
    assert (code, "correct it" in err) == (2, True)
    assert (tmp_path / "global_step_1").is_dir()


def test_an_export_refuses_a_full_folder(trained: Lab, call: Call, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    code, _, err = call("export", "r", "best", tmp_path / "out")
    assert (code, "exists already" in err) == (2, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]


# plot, report


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs a and b, in a working folder without other files."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        log(make(name, attempt()), 1, {step: training(step / 10) for step in range(1, 6)})


@pytest.mark.usefixtures("two")
def test_curves_in_the_terminal_and_as_data(call: Call, document: Document) -> None:
    code, out, _ = call("plot", "a", "b")
    assert (code, out.startswith("● a   ○ b"), "reward" in out) == (0, True, True)
    assert max(map(len, out.splitlines())) <= 80
    found = document("plot", "a", "a", "--metric", "kl", "--smooth", "0")
    assert [(one["run"], one["metric"]) for one in found["curves"]] == [("a", "kl")]
    assert found["smoothing"] == 0
    log(a_run("c"), 1, {1: training(kl=None)})
    code, _, err = call("plot", "a", "c", "--metric", "kl,reward")
    assert (code, "warning: no kl in c" in err) == (0, True)


@pytest.mark.usefixtures("two")
def test_curves_as_pictures_and_pages(call: Call) -> None:
    code, out, err = call("plot", "a", "b", "--png", "out/a.png", "--html", "a.html", "--smooth", "0.25")
    assert (code, out, "written to out/a.png" in err) == (0, "", True)
    assert Path("out/a.png").read_bytes().startswith(b"\x89PNG")
    page = Path("a.html").read_text(encoding="utf-8")
    assert ("<svg" in page, "weight 0.25" in page) == (True, True)
    call("plot", "a", "--html", "a.html", "--smooth", "0")
    assert "moving average" not in Path("a.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("two")
def test_a_report_is_in_the_runs_folder_or_where_out_says(call: Call, document: Document, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert document("report", "a")["name"] == "a"
    assert sorted(tmp_path.rglob("*")) == before, "data needs no page"
    code, out, _ = call("report", "a")
    path = Path(out.strip())
    assert (code, path.name, path.parent.name) == (0, "report.html", "a")
    assert "<h1>a</h1>" in path.read_text(encoding="utf-8")
    assert call("report", "a", "--out", "deep/a.html")[1].strip() == "deep/a.html"
    assert Path("deep/a.html").is_file()
    assert document("report", "a", "--out", "a.html")["name"] == "a"
    assert Path("a.html").is_file()


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("plotext", ("plot", "a")),
        ("matplotlib", ("plot", "a", "--png", "a.png")),
        ("matplotlib", ("plot", "a", "--html", "a.html")),
        ("jinja2", ("plot", "a", "--html", "a.html")),
        ("matplotlib", ("report", "a")),
        ("jinja2", ("report", "a")),
    ],
)
def test_a_missing_package_is_an_error_and_data_needs_none(
    missing: str, words: tuple[str, ...], call: Call, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "installed", lambda package: package != missing)
    code, _, err = call(*words)
    assert (code, f"{missing} is not installed" in err, software.install_extra("plot") in err) == (3, True, True)
    monkeypatch.setattr(figure, "installed", lambda _: False)
    assert document(*words[:2])


def test_help_names_the_defaults_that_there_are() -> None:
    parameters = inspect.signature(commands.plot).parameters
    assert parameters["smooth"].default == SMOOTHING
    assert ", ".join(PLOTTED) in str(parameters["metric"].annotation)


def test_names_are_completed() -> None:
    make("demo", attempt())
    environment = {"_FLASHRL_COMPLETE": "complete_bash"}
    for command in ("show", "watch", "stop", "rm", "checkpoints", "export", "plot", "report"):
        words = {"COMP_WORDS": f"flashrl runs {command} de", "COMP_CWORD": "3"}
        result = CliRunner().invoke(app, [], env=environment | words, prog_name="flashrl")
        assert result.stdout.split() == ["demo"], (command, sys.argv)


@pytest.fixture
def kept_run() -> None:
    run = make("r", attempt(1))
    planned(run, 1, correction={"cap": 2.0})
    kept(run, 1, *range(1, 8))


@pytest.mark.usefixtures("kept_run")
def test_corrections_are_compared(call: Call, document: Document) -> None:
    code, out, err = call("correction", "r")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "steps 3 to 7: 200 of 400 responses, 12,000 tokens"
    columns = out.splitlines()[2].split()
    assert (columns[0], columns[-1]) == ("correction", "error")
    assert "tis 2 (the run)" in out
    assert "Least estimated error:" in out
    assert "\x1b[" not in out
    found = document("correction", "r", "--last", 2)
    assert (found["run"], found["steps"], found["own"]) == ("r", [6, 7], "tis 2")
    errors = [row["error"] for row in found["corrections"]]
    assert errors == sorted(errors)
    assert found["corrections"][0]["name"] == found["best"]["1"]
    assert document("correction", "r", "--step", 1)["steps"] == [1]


@pytest.mark.usefixtures("kept_run")
@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (("--step", 9), 2, "kept no log-ratios of step 9", "there are: 1 to 7"),
        (("--step", 1, "--last", 2), 2, "exclude each other", "--step N"),
        (("--staleness", 1), 2, "no kept response has a staleness of 1", "there are: 0"),
    ],
)
def test_steps_that_are_not_there(call: Call, words: tuple[object, ...], code: int, message: str, hint: str) -> None:
    found, out, err = call("correction", "r", *words)
    assert (found, out) == (code, "")
    assert message in err
    assert f"hint: {hint}" in err


def test_a_run_without_kept_log_ratios(call: Call) -> None:
    make("old", attempt(1))
    code, _, err = call("correction", "old")
    assert code == 4
    assert "error: run old kept no log-ratios" in err
    assert "hint: " in err


@pytest.mark.usefixtures("kept_run")
def test_a_damaged_step_is_warned_of(call: Call) -> None:
    (paths.runs_root() / "r" / "attempt_1" / "log_ratios" / "step_000007.npz").write_bytes(b"PK")
    code, out, err = call("correction", "r")
    assert code == 0
    assert err.startswith("warning: ")
    assert "step_000007.npz is damaged" in err
    assert out.startswith("steps 3 to 6")


@pytest.mark.usefixtures("kept_run")
def test_a_picture_of_kept_log_ratios(call: Call, tmp_path: Path) -> None:
    code, _, err = call("correction", "r", "--png", tmp_path / "k.png", "--json")
    assert (code, err) == (0, f"written to {tmp_path / 'k.png'}\n")
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("kept_run")
def test_kept_log_ratios_count_and_go_with_their_run(call: Call, document: Document) -> None:
    (row,) = document("ls")["runs"]
    assert row["run_bytes"] > 7 * 2400
    assert call("rm", "r", "--yes")[0] == 0
    assert not (paths.runs_root() / "r").exists()

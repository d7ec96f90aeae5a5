"""`flashrl train --sweep`, as people and programs call it: every run judged first, then one after another, then a table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import files, paths
from flashrl_cli.config.resolve import Resolved
from flashrl_cli.errors import FlashrlError, RunFailed
from flashrl_cli.machine import software
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt, RunRecord
from flashrl_cli.train import launch, preflight, run, sweep_axes
from flashrl_cli.train.plan import LaunchPlan, plan_document
from flashrl_cli.train.process import Interrupted
from flashrl_cli.verl.metrics import NAMES
from tests.unit.cli.test_train import prepared, train, tree

SWEEP = (
    *("--preset", "tiny", "--name", "s", "--set", "trainer.steps=3"),
    *("--sweep", "rollout=bf16,int8", "--sweep", "tis=2"),
)
RUNS = ["s-bf16-tis2", "s-int8-tis2"]


@pytest.fixture(autouse=True)
def able(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with all software, no GPU, the data of tiny, and no time for verl's tree; an empty working folder."""
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(launch, "judge", judge)
    for name in ("RAY_ADDRESS", *software.ENTRY_POINTS.values()):
        monkeypatch.delenv(name, raising=False)
    prepared(tmp_path)
    monkeypatch.chdir(tmp_path)


def judge(resolved: Resolved, plan: LaunchPlan) -> None:
    if resolved.broken:
        raise resolved.refusal(resolved.broken)


class Trainer:
    """In place of `run_plan`: leaves record and metrics, and fails where `errors` says so."""

    def __init__(self) -> None:
        self.plans: list[LaunchPlan] = []
        self.errors: dict[str, FlashrlError] = {}

    def __call__(self, plan: LaunchPlan, display: Any, **_: Any) -> int:
        self.plans.append(plan)
        error = self.errors.get(plan.name)
        files.write_json(plan.attempt_paths.plan, plan_document(plan))
        reward = 0.75 if plan.spec.rollout.precision == "int8" else 0.5
        steps = 1 if error else 3
        lines = [json.dumps({"step": step, "data": {NAMES["reward"]: reward}}) for step in range(1, steps + 1)]
        files.write_text(plan.attempt_paths.metrics, "\n".join(lines) + "\n")
        attempt = Attempt(
            number=plan.attempt,
            status="failed" if error else "done",
            started="t",
            updated="t",
            last_step=steps,
            total_steps=3,
            error=error.message if error else None,
        )
        store.change(plan.paths, lambda found: _with(found, plan, attempt))
        if error:
            raise error
        return steps

    @property
    def trained(self) -> list[str]:
        return [plan.name for plan in self.plans]


def _with(found: RunRecord | None, plan: LaunchPlan, attempt: Attempt) -> RunRecord:
    before = found.attempts if found else ()
    return RunRecord(
        name=plan.name, project="p", preset="tiny", created="t", checkpoints="", attempts=(*before, attempt)
    )


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    monkeypatch.setattr(run, "run_plan", made)
    return made


def test_dry_run_shows_the_runs_and_starts_none(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(tmp_path)
    assert train(monkeypatch, *SWEEP, "--dry-run") == 0
    assert tree(tmp_path) == before
    assert trainer.plans == []
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if "s-" in line] == [
        ["bf16", "2", "s-bf16-tis2", "waiting", "–"],
        ["int8", "2", "s-int8-tis2", "waiting", "–"],
    ]


def test_dry_run_for_a_program(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, *SWEEP, "--dry-run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert [point["run"] for point in document["points"]] == RUNS
    first = document["points"][0]
    assert (first["values"], first["state"]) == ({"rollout": "bf16", "tis": 2}, "waiting")
    assert first["plan"]["name"] == "s-bf16-tis2"
    assert first["plan"]["spec"]["rollout"]["precision"] == "bf16"


def test_runs_in_order_and_the_table(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, *SWEEP) == 0
    assert trainer.trained == RUNS
    out, err = capsys.readouterr()
    assert "[1/2] rollout=bf16 tis=2: run s-bf16-tis2 starts" in err
    rows = [line.split() for line in out.splitlines() if "s-" in line]
    assert rows[0][:6] == ["bf16", "2", "s-bf16-tis2", "done", "3/3", "0.5"]
    assert rows[1][:6] == ["int8", "2", "s-int8-tis2", "done", "3/3", "0.75"]
    assert "★" not in rows[0]
    assert rows[1][-1] == "★"


def test_for_a_program(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(monkeypatch, *SWEEP, "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["point", "result", "point", "result", "sweep"]
    assert events[0] == {
        "schema_version": 1,
        "event": "point",
        "number": 1,
        "of": 2,
        "run": "s-bf16-tis2",
        "doing": "starts",
    }
    last = events[-1]
    assert (last["best"], [point["reward"] for point in last["points"]]) == ("s-int8-tis2", [0.5, 0.75])
    assert events[3].items() >= last["points"][1].items()


def test_the_same_command_goes_on_and_shows_the_table_again(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.errors["s-int8-tis2"] = Interrupted(2, "as `train` says it")
    assert train(monkeypatch, *SWEEP) == 130
    out, err = capsys.readouterr()
    assert "s-bf16-tis2" in out
    assert "error: stopped by SIGINT" in err
    assert "hint: the same command goes on with run s-int8-tis2" in err
    trainer.errors.clear()
    assert train(monkeypatch, *SWEEP) == 0
    assert trainer.trained == [*RUNS, "s-int8-tis2"]
    assert trainer.plans[-1].attempt == 2
    assert "run s-bf16-tis2 is done" in capsys.readouterr().err
    assert train(monkeypatch, *SWEEP) == 0
    assert len(trainer.plans) == 3
    assert "★" in capsys.readouterr().out


def test_a_failure_goes_on_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.errors["s-bf16-tis2"] = RunFailed("out of memory", hint="less")
    assert train(monkeypatch, *SWEEP) == 1
    assert trainer.trained == RUNS
    out, err = capsys.readouterr()
    assert "warning: run s-bf16-tis2 failed: out of memory" in err
    assert "error: 1 of 2 runs failed: s-bf16-tis2" in err
    assert "failed" in out


def test_fail_fast(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.errors["s-bf16-tis2"] = RunFailed("out of memory", hint="less")
    assert train(monkeypatch, *SWEEP, "--fail-fast", "--json") == 1
    assert trainer.trained == RUNS[:1]
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["point", "failed", "result", "sweep"]
    assert events[1]["error"] == "out of memory"
    assert [point["state"] for point in events[-1]["points"]] == ["failed", "waiting"]


def test_a_machine_that_cannot_run_one_of_them_starts_none(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, "--preset", "tiny", "--sweep", "rollout=int8,fp8") == 3
    assert trainer.plans == []
    assert "FP8 rollouts need a GPU (compute capability 8.9 or newer) (with rollout=fp8)" in capsys.readouterr().err
    assert not paths.runs_root().exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "rollout"], "--sweep rollout: not of the form key=value,value"),
        (["--sweep", "rollout=int8,int3"], "--sweep rollout=int3: rollout.precision = int3"),
        (["--sweep", "algorithm.lrr=1,2"], "did you mean algorithm.lr?"),
        (["--sweep", "rollout=int8,bf16", "--rollout", "int8"], "rollout is given by --rollout, too"),
        (["--sweep", "tis=1,2", "--resume", "/x/global_step_3"], "a sweep has many runs"),
        (["--sweep", "tis=1,2", "--name", "../x"], "not the name of a folder"),
        (["--sweep", "no.yaml"], "no.yaml: cannot be read"),
        (["--fail-fast"], "--fail-fast and --yes belong to --sweep"),
        (["--yes"], "--fail-fast and --yes belong to --sweep"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_misuse_ends_with_2(
    words: list[str],
    message: str,
    dry: list[str],
    monkeypatch: pytest.MonkeyPatch,
    trainer: Trainer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = tree(tmp_path)
    assert train(monkeypatch, "--preset", "tiny", *words, *dry) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert tree(tmp_path) == before
    assert trainer.plans == []


@pytest.mark.parametrize(("words", "code", "started"), [([], 2, 0), (["--yes"], 0, 2), (["--dry-run"], 0, 0)])
def test_many_runs_are_started_when_meant(
    words: list[str], code: int, started: int, monkeypatch: pytest.MonkeyPatch, trainer: Trainer
) -> None:
    monkeypatch.setattr(sweep_axes, "MANY", 1)
    assert train(monkeypatch, *SWEEP, *words) == code
    assert len(trainer.plans) == started


def test_detached(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def fake(at: RunPaths, command: Sequence[str]) -> Attempt:
        asked.append(at.name)
        assert command[:3] == ["train", "--preset", "tiny"]
        return Attempt(number=1, status="running", started="t", updated="t", pid=7)

    monkeypatch.setattr(run, "detach", fake)
    assert train(monkeypatch, *SWEEP, "--detach") == 0
    assert (asked, trainer.plans) == (["s-bf16-tis2"], [])
    assert "goes on as process 7" in capsys.readouterr().err


def test_a_run_of_another_configuration_goes_on_by_force(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.errors["s-bf16-tis2"] = RunFailed("broke", hint="fix it")
    assert train(monkeypatch, *SWEEP) == 1
    changed = (*SWEEP, "--set", "algorithm.lr=0.25")
    assert train(monkeypatch, *changed) == 2
    err = capsys.readouterr().err
    assert "run s-bf16-tis2 was started with another configuration: algorithm.lr" in err
    assert "run s-int8-tis2 was started with another configuration: algorithm.lr" in err
    assert len(trainer.plans) == 2
    trainer.errors.clear()
    assert train(monkeypatch, *changed, "--force") == 0
    assert trainer.trained[2:] == ["s-bf16-tis2"]


def test_a_file(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "grid: {rollout: [bf16, int8]}\nzip:\n- {tis: [1, 2], algorithm.lr: [1e-4, 2e-4]}\n"
    )
    assert train(monkeypatch, "--preset", "tiny", "--sweep", "s.yaml") == 0
    assert trainer.trained == [
        "tiny-bf16-tis1-lr1e-4",
        "tiny-bf16-tis2-lr2e-4",
        "tiny-int8-tis1-lr1e-4",
        "tiny-int8-tis2-lr2e-4",
    ]

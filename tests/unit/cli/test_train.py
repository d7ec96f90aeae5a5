"""`flashrl train`, here and with `--executor ray`, as people and programs call it: what it refuses and prints, and what it starts."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import files
from flashrl_cli.cli.app import main
from flashrl_cli.errors import EnvironmentNotReady, RunFailed
from flashrl_cli.machine import software
from flashrl_cli.render.live import JsonDisplay, PlainDisplay
from flashrl_cli.runs import store
from flashrl_cli.train import preflight, process, run
from flashrl_cli.train.executors import ray_job, ray_ready
from flashrl_cli.train.plan import LaunchPlan, plan_document
from tests import sample_rows
from tests.saved_files import saved_step
from tests.unit.train.builders import FakeJobs

ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture(autouse=True)
def able(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with all software and no GPU, whatever runs the tests; commands are typed in an empty folder."""
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for name in ("RAY_ADDRESS", *software.ENTRY_POINTS.values()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LaunchPlan, Any, int | None]]:
    """What was handed to the supervisor, which does 3 steps."""
    calls: list[tuple[LaunchPlan, Any, int | None]] = []

    def fake(plan: LaunchPlan, display: Any, _: list[int], *, vocabulary: int | None = None, **__: Any) -> int:
        calls.append((plan, display.display, vocabulary))
        return 3

    monkeypatch.setattr(run, "supervise", fake)
    monkeypatch.setattr(run, "git_state", lambda _: None)
    return calls


def train(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run `flashrl train WORDS` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["flashrl", "train", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def prepared(root: Path) -> None:
    tiny = root / "data/tiny"
    (tiny / "model").mkdir(parents=True)
    (tiny / "model/config.json").write_text('{"vocab_size": 259}')
    for split in ("train", "test"):
        sample_rows.write(tiny / f"{split}.parquet")


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(root.rglob("*"))}


def test_a_cluster_run_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, "--preset", "dapo-32b") == 3
    out, err = capsys.readouterr()
    assert not out
    assert "error: this machine cannot run dapo-32b" in err
    assert "it needs 4 x 8 CUDA GPUs; this machine has 0" in err
    assert f"data.train: {tmp_path}/data/dapo-math-17k/train.parquet does not exist" in err
    assert "data.val: " in err
    assert "hint: `flashrl prepare dapo-math-17k`" in err
    assert tree(tmp_path) == {}


def test_unprepared_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(monkeypatch, "--preset", "tiny") == 3
    err = capsys.readouterr().err
    assert f"{tmp_path}/data/tiny/train.parquet does not exist" in err
    assert f"model.path: {tmp_path}/data/tiny/model does not exist" in err
    assert "hint: `flashrl prepare tiny`" in err
    assert tree(tmp_path) == {}


def test_fp8_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path)
    assert train(monkeypatch, "--preset", "tiny", "--rollout", "fp8") == 3
    err = capsys.readouterr().err
    assert "FP8 rollouts need a GPU" in err
    assert "hint: `--rollout int8` runs on a CPU" in err


@pytest.mark.parametrize("used", ["runs/tiny-int8-tis2/attempt_1", "checkpoints/tiny/tiny-int8-tis2"])
def test_used_name(
    used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / used).mkdir(parents=True)
    assert train(monkeypatch, "--preset", "tiny") == 2
    err = capsys.readouterr().err
    assert "error: run tiny-int8-tis2 exists already" in err
    assert "hint: `--resume auto` goes on with it, `--name tiny-int8-tis2-2` starts another" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "no-such"], "no-such"),
        (["--preset", "tiny", "--rollout", "int3"], "int3"),
        (["--preset", "tiny", "--tis", "some"], "some"),
        (["--preset", "tiny", "--set", "a=1"], "a"),
        (["--preset", "tiny", "--set", "verl.trainer.no_such=1"], "verl has no key trainer.no_such"),
        (["--preset", "tiny", "--resume", "nowhere"], "--resume nowhere: no folder global_step_N"),
        ([], "--preset"),
        (["--preset", "tiny", "--executor", "slurm"], "--executor slurm: there is no such executor"),
        (["--preset", "tiny", "--ray-address", "http://h:1"], "--ray-address without --executor ray"),
        (["--preset", "tiny", "--set", "rollout.top_p=0.9"], "--set rollout.top_p: rollout.top_p = 0.9 with truncated"),
        (["--preset", "tiny", "--tis", "off", "--tis", "2", "--set", "rollout.top_k=5"], "off by the kept mass"),
        (["--preset", "tiny", "--sweep", "rollout.top_p=1.0,0.9"], "off by the kept mass"),
        (["--preset", "tiny", "--set", f"verl.{ROLLOUT}.top_p=0.9"], "hint: --set rollout.top_p=…"),
        (["--preset", "tiny", "--set", f"verl.+{ROLLOUT}.min_p=0.1"], "verl's RolloutConfig has no min_p"),
        (["--preset", "tiny", "--set", f"verl.+{ROLLOUT}.repetition_penalty=1.1"], "every request says 1.0"),
        (["--preset", "tiny", "--set", f"verl.+{ROLLOUT}.engine_kwargs.vllm.min_p=0.1"], "an option of a request"),
        (
            ["--preset", "tiny", "--set", f"verl.+{ROLLOUT}.engine_kwargs.vllm.override_generation_config.min_p=0.1"],
            "requests name their own sampling",
        ),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_misuse_ends_with_2(
    words: list[str],
    message: str,
    dry: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(monkeypatch, *words, *dry) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("preset", ["tiny", "dapo-32b"])
@pytest.mark.parametrize("words", [["--dry-run"], ["-n", "--json"]])
def test_dry_run_writes_nothing_and_needs_nothing(
    preset: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: list[Any]
) -> None:
    (tmp_path / "runs/other").mkdir(parents=True)
    before = tree(tmp_path)
    assert train(monkeypatch, "--preset", preset, *words) == 0
    assert tree(tmp_path) == before
    assert launched == []


def test_dry_run_prints_a_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(monkeypatch, "--preset", "tiny", "--dry-run", "--name", "abc", "--set", "trainer.steps=3") == 0
    out, err = capsys.readouterr()
    assert not err
    assert out.startswith("#!/bin/sh\n")
    assert "runs/abc/attempt_1" in out
    assert "trainer.total_training_steps=3" in out


def test_dry_run_for_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, "--preset", "tiny", "--tis", "4", "--dry-run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [
        "schema_version",
        "preset",
        "name",
        "attempt",
        "argv",
        "env",
        "cwd",
        "overrides",
        "files",
        "resume",
        "spec",
        "origins",
        "memory",
        "notes",
    ]
    assert (document["schema_version"], document["preset"], document["name"]) == (1, "tiny", "tiny-int8-tis4")
    assert document["argv"][:3] == [sys.executable, "-m", "verl.trainer.main_ppo"]
    assert document["cwd"] == f"{tmp_path}/runs/tiny-int8-tis4/attempt_1"


def test_truncated_sampling_under_tis_is_refused_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("extends: tiny\nrollout:\n  top_p: 0.9\n  top_k: 20\n")
    assert train(monkeypatch, "--preset", str(preset), "--tis", "2", "--dry-run") == 2
    err = capsys.readouterr().err
    assert "mine.yaml:3: rollout.top_p = 0.9 with truncated importance sampling" in err
    assert "mine.yaml:4: rollout.top_k = 20 with truncated importance sampling" in err


@pytest.mark.parametrize(("cut", "times"), [("rollout.top_p=0.9", 1), ("rollout.top_p=1.0", 0)])
def test_truncated_sampling_without_tis_is_noted_once(
    cut: str,
    times: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launched: list[Any],
) -> None:
    prepared(tmp_path)
    words = ("--preset", "tiny", "--tis", "off", "--set", cut)
    note = "plus the mean of -ln(kept mass)"
    assert train(monkeypatch, *words, "--dry-run") == 0
    assert capsys.readouterr().out.count(note) == times
    assert train(monkeypatch, *words, "--dry-run", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == times
    assert launched == []
    assert train(monkeypatch, *words) == 0
    assert capsys.readouterr().err.count(note) == times
    assert len(launched) == 1


def test_dry_run_of_a_used_name_shows_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs/r/attempt_1").mkdir(parents=True)
    assert train(monkeypatch, "--preset", "tiny", "--name", "r", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["attempt"] == 2


def test_launch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launched: list[tuple[LaunchPlan, Any, int | None]],
) -> None:
    prepared(tmp_path)
    assert train(monkeypatch, "--preset", "tiny", "--name", "r", "--set", "trainer.steps=7") == 0
    ((plan, display, vocabulary),) = launched
    assert (plan.name, plan.attempt, vocabulary) == ("r", 1, 259)
    assert isinstance(display, PlainDisplay)
    assert display.total == 7
    out, err = capsys.readouterr()
    assert not out
    assert f"run r, attempt 1: `tail -F {tmp_path}/runs/r/attempt_1/driver.log`" in err
    assert f"done: 3 steps; checkpoints in {tmp_path}/checkpoints/tiny/r" in err


def test_launch_for_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: list[Any]) -> None:
    prepared(tmp_path)
    assert train(monkeypatch, "--preset", "tiny", "--json") == 0
    ((_, display, _),) = launched
    assert isinstance(display, JsonDisplay)


def test_resumed_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launched: list[Any]
) -> None:
    prepared(tmp_path)
    (tmp_path / "runs/r/attempt_1").mkdir(parents=True)
    step = saved_step(tmp_path / "checkpoints/tiny/r", 5, world_size=1)
    torn = saved_step(tmp_path / "checkpoints/tiny/r", 10, world_size=1)
    (torn / "data.pt").unlink()
    assert train(monkeypatch, "--preset", "tiny", "--name", "r", "--resume", "auto") == 0
    err = capsys.readouterr().err
    assert f"going on from step 5: {step}" in err
    assert "setting global_step_10 aside: incomplete: data.pt: missing" in err
    assert not torn.exists()
    assert train(monkeypatch, "--preset", "tiny", "--name", "r", "--resume", str(step)) == 0
    (auto, *_), (path, *_) = launched
    assert (auto.attempt, path.attempt) == (2, 3)
    for plan in (auto, path):
        assert f"trainer.resume_from_path={step}" in plan.argv
    found = store.load(tmp_path / "runs/r/run.json")
    assert found
    assert [(one.number, one.status, one.resumed_from) for one in found.attempts] == [(2, "done", 5), (3, "done", 5)]
    assert found.attempts[0].set_aside == ("global_step_10: incomplete: data.pt: missing",)


def test_a_complete_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launched: list[Any]
) -> None:
    prepared(tmp_path)
    saved_step(tmp_path / "checkpoints/tiny/r", 15, world_size=1)
    assert train(monkeypatch, "--preset", "tiny", "--name", "r", "--resume", "auto") == 0
    assert "run r is complete: 15 steps" in capsys.readouterr().err
    assert launched == []


def test_another_configuration_needs_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launched: list[Any]
) -> None:
    prepared(tmp_path)
    words = ("--preset", "tiny", "--name", "r", "--resume", "auto")
    assert train(monkeypatch, *words) == 0
    files.write_json(launched[0][0].attempt_paths.plan, plan_document(launched[0][0]))
    capsys.readouterr()
    longer = ("--set", "trainer.steps=30", "--set", "watch.max_kl=0.9")
    assert train(monkeypatch, *words, *longer) == 0, "how long it runs and how it is watched is free"
    assert train(monkeypatch, *words, "--set", "algorithm.lr=5e-5", "--tis", "4") == 2
    err = capsys.readouterr().err
    assert "run r was started with another configuration" in err
    assert "0.0001 → 5e-5" in err
    assert "correction.cap: 2.0 → 4.0" in err
    assert "--force" in err
    assert train(monkeypatch, *words, "--set", "algorithm.lr=5e-5", "--force") == 0
    assert len(launched) == 3


def test_a_run_under_way_is_not_started_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launched: list[Any]
) -> None:
    prepared(tmp_path)
    assert train(monkeypatch, "--preset", "tiny", "--name", "r") == 0
    store.renew(launched[0][0].paths, 1, status="running")
    assert train(monkeypatch, "--preset", "tiny", "--name", "r", "--resume", "auto") == 2
    err = capsys.readouterr().err
    assert "run r is under way: attempt 1, process" in err
    assert "flashrl runs stop r" in err
    store.renew(launched[0][0].paths, 1, pid_started=1.0)
    assert train(monkeypatch, "--preset", "tiny", "--name", "r", "--resume", "auto") == 0, "its process is gone"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailed("it broke", hint="fix it"), 1),
        (process.Interrupted(2, "go on"), 130),
        (process.Interrupted(15, "go on"), 143),
    ],
)
def test_exit_codes(
    error: Exception,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise error

    prepared(tmp_path)
    monkeypatch.setattr(run, "supervise", fail)
    monkeypatch.setattr(run, "git_state", lambda _: None)
    assert train(monkeypatch, "--preset", "tiny") == code
    err = capsys.readouterr().err
    assert f"error: {error}" in err
    assert "hint: " in err
    assert "done" not in err


RAY = ("--executor", "ray")


@pytest.mark.parametrize(("preset", "nodes"), [("dapo-32b", 4), ("tiny", 1), ("gsm8k-0.5b", 1)])
def test_dry_run_shows_the_job(
    preset: str, nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--preset", preset, *RAY, "--ray-address", "http://head:8265", "--dry-run", "--json")
    assert train(monkeypatch, *words) == 0
    document = json.loads(capsys.readouterr().out)
    job = document["ray"]
    assert job["address"] == "http://head:8265"
    assert shlex.split(job["entrypoint"]) == ["exec", *document["argv"]]
    assert f"trainer.nnodes={nodes}" in document["overrides"]
    assert document["env"].items() <= job["runtime_env"]["env_vars"].items()
    assert not [override for override in document["overrides"] if "ray_init" in override]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_planned_for_the_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, "--preset", "tiny", "--sweep", "tis=off,2", *RAY, "-n", "--json") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert len(points) == 2
    assert not [o for point in points for o in point["plan"]["overrides"] if "ray_init" in o]


def test_the_script_of_a_dry_run_submits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert train(monkeypatch, "--preset", "dapo-32b", *RAY, "-n") == 0
    out = capsys.readouterr().out
    assert "exec ray job submit --no-wait \\\n  --address http://head:8265 \\\n" in out
    assert out.rstrip().endswith('-m verl.trainer.main_ppo "$@"')


def test_a_local_dry_run_knows_no_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert train(monkeypatch, "--preset", "tiny", "-n", "--json") == 0
    assert "ray" not in json.loads(capsys.readouterr().out)


def test_no_job_server_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(address: str) -> Any:
        raise EnvironmentNotReady(f"no Ray job server answers at {address}", hint="--ray-address http://HEAD:8265")

    monkeypatch.setattr(ray_job, "connect", refuse)
    assert train(monkeypatch, "--preset", "tiny", *RAY) == 3
    assert "error: no Ray job server answers at http://127.0.0.1:8265" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_supervisor_is_given_the_clusters_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, started = FakeJobs(), []

    def supervise(plan: Any, *_: Any, start: Any, **__: Any) -> int:
        plan.attempt_paths.plugins.mkdir(parents=True)
        started.append(start(plan))
        started[-1].kill()
        return 3

    monkeypatch.setattr(ray_job, "connect", lambda _: jobs)
    monkeypatch.setattr(ray_ready, "check", lambda *_: ray_ready.Readiness(shared=True, nodes=2))
    monkeypatch.setattr(run, "supervise", supervise)
    monkeypatch.setattr(run, "git_state", lambda _: None)
    assert train(monkeypatch, "--preset", "tiny", "--name", "r", *RAY) == 0
    assert "asking every node of the Ray cluster at http://127.0.0.1:8265" in capsys.readouterr().err
    last = json.loads(Path("runs/r/run.json").read_text(encoding="utf-8"))["attempts"][-1]
    assert (last["executor"], last["job_id"], last["status"]) == ("ray", started[0].id, "done")

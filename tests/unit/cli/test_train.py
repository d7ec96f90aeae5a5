"""`flashrl train`, here, with `--executor ray` and with `--sweep`: what it refuses, what it prints, what it starts."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flashrl_cli import files
from flashrl_cli.cli.app import main
from flashrl_cli.config.resolve import Resolved
from flashrl_cli.errors import EnvironmentNotReady, FlashrlError, RunFailed
from flashrl_cli.machine import software
from flashrl_cli.paths import RunPaths
from flashrl_cli.render.live import JsonDisplay, PlainDisplay
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt, RunRecord
from flashrl_cli.signals import Interrupted
from flashrl_cli.train import launch, preflight, run, sweep_axes
from flashrl_cli.train.executors import ray_job, ray_ready
from flashrl_cli.train.plan import LaunchPlan, plan_document
from flashrl_cli.verl.compose import Tree
from flashrl_cli.verl.metrics import NAMES
from tests import sample_rows
from tests.saved_files import saved_step
from tests.unit.train.builders import FakeJobs

ROLLOUT = "actor_rollout_ref.rollout"
TINY = ("--preset", "tiny")
WARM = (*TINY, "--set", "rollout.temperature=0.7")
"""At another temperature than 1, where vLLM's raw log-probs would not be those of the samples."""
AGAIN = (*TINY, "--name", "r", "--resume", "auto")


class Ended(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Train = Callable[..., Ended]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """`train(*words)` is `flashrl train WORDS` in this process, in an empty folder of a machine without a GPU."""
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(run, "git_state", lambda _: None)
    for name in ("RAY_ADDRESS", *software.ENTRY_POINTS.values()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["flashrl", "train", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return Ended(int(caught.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """The folder of the test, with the data of tiny."""
    tiny = tmp_path / "data/tiny"
    (tiny / "model").mkdir(parents=True)
    (tiny / "model/config.json").write_text('{"vocab_size": 259}')
    for split in ("train", "test"):
        sample_rows.write(tiny / f"{split}.parquet")
    return tmp_path


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LaunchPlan, Any, int | None]]:
    """What was handed to the supervisor, which does 3 steps."""
    calls: list[tuple[LaunchPlan, Any, int | None]] = []

    def supervise(plan: LaunchPlan, display: Any, _: list[int], *, vocabulary: int | None, **__: Any) -> int:
        calls.append((plan, display.display, vocabulary))
        return 3

    monkeypatch.setattr(run, "supervise", supervise)
    return calls


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(root.rglob("*"))}


# what is refused


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            ["--preset", "dapo-32b"],
            [
                "error: this machine cannot run dapo-32b",
                "it needs 4 x 8 CUDA GPUs; this machine has 0",
                "data.train: {root}/data/dapo-math-17k/train.parquet does not exist",
                "data.val: ",
                "hint: `flashrl prepare dapo-math-17k`",
            ],
        ),
        (
            TINY,
            [
                "{root}/data/tiny/train.parquet does not exist",
                "model.path: {root}/data/tiny/model does not exist",
                "hint: `flashrl prepare tiny`",
            ],
        ),
        ([*TINY, "--rollout", "fp8"], ["FP8 rollouts need a GPU", "hint: `--rollout int8` runs on a CPU"]),
    ],
)
def test_a_machine_that_cannot_run_it_ends_with_3(
    words: list[str], messages: list[str], train: Train, tmp_path: Path
) -> None:
    found = train(*words)
    assert (found.code, found.out) == (3, "")
    assert [text for text in messages if text.format(root=tmp_path) not in found.err] == []
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("used", ["runs/tiny-int8-tis2/attempt_1", "checkpoints/tiny/tiny-int8-tis2"])
def test_a_used_name(used: str, train: Train, tmp_path: Path) -> None:
    (tmp_path / used).mkdir(parents=True)
    found = train(*TINY)
    assert found.code == 2
    assert "error: run tiny-int8-tis2 exists already" in found.err
    assert "hint: `--resume auto` goes on with it, `--name tiny-int8-tis2-2` starts another" in found.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "no-such"], "no-such"),
        ([], "--preset"),
        ([*TINY, "--rollout", "int3"], "int3"),
        ([*TINY, "--tis", "some"], "some"),
        ([*TINY, "--set", "a=1"], "a"),
        ([*TINY, "--set", "verl.trainer.no_such=1"], "verl has no key trainer.no_such"),
        ([*TINY, "--resume", "nowhere"], "--resume nowhere: no folder global_step_N"),
        ([*TINY, "--executor", "slurm"], "--executor slurm: there is no such executor"),
        ([*TINY, "--ray-address", "http://h:1"], "--ray-address without --executor ray"),
        ([*WARM, "--set", "rollout.top_p=0.9"], "--set rollout.top_p: rollout.top_p = 0.9 with truncated"),
        ([*WARM, "--tis", "off", "--tis", "2", "--set", "rollout.top_k=5"], "off by the kept mass"),
        ([*TINY, "--set", f"verl.{ROLLOUT}.top_p=0.9"], "hint: --set rollout.top_p=…"),
        ([*TINY, "--set", f"verl.+{ROLLOUT}.min_p=0.1"], "verl's RolloutConfig has no min_p"),
        ([*TINY, "--set", f"verl.+{ROLLOUT}.repetition_penalty=1.1"], "every request says 1.0"),
        ([*TINY, "--set", f"verl.+{ROLLOUT}.engine_kwargs.vllm.min_p=0.1"], "an option of a request"),
        (
            [*TINY, "--set", f"verl.+{ROLLOUT}.engine_kwargs.vllm.override_generation_config.min_p=0.1"],
            "requests name their own sampling",
        ),
        ([*TINY, "--fail-fast"], "--fail-fast and --yes belong to --sweep"),
        ([*TINY, "--yes"], "--fail-fast and --yes belong to --sweep"),
        ([*TINY, "--sweep", "rollout"], "--sweep rollout: not of the form key=value,value"),
        ([*TINY, "--sweep", "rollout=int8,int3"], "--sweep rollout=int3: rollout.precision = int3"),
        ([*TINY, "--sweep", "algorithm.lrr=1,2"], "did you mean algorithm.lr?"),
        ([*WARM, "--sweep", "rollout.top_p=1.0,0.9"], "off by the kept mass"),
        ([*TINY, "--sweep", "rollout=int8,bf16", "--rollout", "int8"], "rollout is given by --rollout, too"),
        ([*TINY, "--sweep", "tis=1,2", "--resume", "/x/global_step_3"], "a sweep has many runs"),
        ([*TINY, "--sweep", "tis=1,2", "--name", "../x"], "not the name of a folder"),
        ([*TINY, "--sweep", "no.yaml"], "no.yaml: cannot be read"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_misuse_ends_with_2(words: list[str], message: str, dry: list[str], train: Train, tmp_path: Path) -> None:
    found = train(*words, *dry)
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert tree(tmp_path) == {}


def test_truncated_sampling_under_tis_is_refused_by_its_line(train: Train, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("extends: tiny\nrollout:\n  top_p: 0.9\n  top_k: 20\n  temperature: 0.7\n")
    found = train("--preset", str(preset), "--tis", "2", "--dry-run")
    assert found.code == 2
    assert "mine.yaml:3: rollout.top_p = 0.9 with truncated importance sampling" in found.err
    assert "mine.yaml:4: rollout.top_k = 20 with truncated importance sampling" in found.err


@pytest.mark.parametrize(("cut", "times"), [("rollout.top_p=0.9", 1), ("rollout.top_p=1.0", 0)])
def test_truncated_sampling_without_tis_is_noted_once(
    cut: str, times: int, train: Train, prepared: Path, launched: list[Any]
) -> None:
    words = (*TINY, "--tis", "off", "--set", cut)
    note = "plus the mean of -ln(kept mass)"
    assert train(*words, "--dry-run").out.count(note) == times
    assert len(train(*words, "--dry-run", "--json").document["notes"]) == times
    assert launched == []
    found = train(*words)
    assert (found.code, found.err.count(note), len(launched)) == (0, times, 1)


# dry runs


@pytest.mark.parametrize("preset", ["tiny", "dapo-32b"])
@pytest.mark.parametrize("words", [["--dry-run"], ["-n", "--json"]])
def test_a_dry_run_writes_nothing_and_needs_nothing(
    preset: str, words: list[str], train: Train, tmp_path: Path, launched: list[Any]
) -> None:
    (tmp_path / "runs/other").mkdir(parents=True)
    before = tree(tmp_path)
    assert train("--preset", preset, *words).code == 0
    assert tree(tmp_path) == before
    assert launched == []


def test_a_dry_run_prints_a_script(train: Train) -> None:
    found = train(*TINY, "--dry-run", "--name", "abc", "--set", "trainer.steps=3")
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith("#!/bin/sh\n")
    assert "runs/abc/attempt_1" in found.out
    assert "trainer.total_training_steps=3" in found.out


def test_a_dry_run_for_a_program(train: Train, tmp_path: Path) -> None:
    document = train(*TINY, "--tis", "4", "--dry-run", "--json").document
    keys = "schema_version preset name attempt argv env cwd overrides files reward resume spec origins"
    assert list(document) == [*keys.split(), "memory", "validation", "slow", "notes"]
    assert (document["schema_version"], document["preset"], document["name"]) == (1, "tiny", "tiny-int8-tis4")
    assert document["argv"][:3] == [sys.executable, "-m", "verl.trainer.main_ppo"]
    assert document["cwd"] == f"{tmp_path}/runs/tiny-int8-tis4/attempt_1"


def test_a_dry_run_says_what_is_validated_when_and_how_much(train: Train, prepared: Path) -> None:
    words = (*TINY, "--dry-run", "--set", "trainer.validate_every=5")
    before = ("--set", "trainer.validate_before=true")
    assert "# validation: 4 prompts of tiny every 5 steps and after the last\n" in train(*words).out
    document = train(*words, *before, "--json").document
    assert document["validation"] == {"data": "tiny", "prompts": 4, "responses": 1, "before": 1, "every": 5}


def test_a_dry_run_of_a_used_name_shows_the_next_attempt(train: Train, tmp_path: Path) -> None:
    (tmp_path / "runs/r/attempt_1").mkdir(parents=True)
    assert train(*TINY, "--name", "r", "--dry-run", "--json").document["attempt"] == 2


# launches


def test_a_launch(train: Train, prepared: Path, launched: list[Any]) -> None:
    found = train(*TINY, "--name", "r", "--set", "trainer.steps=7")
    ((plan, display, vocabulary),) = launched
    assert (plan.name, plan.attempt, vocabulary) == ("r", 1, 259)
    assert isinstance(display, PlainDisplay)
    assert display.total == 7
    assert (found.code, found.out) == (0, "")
    assert f"run r, attempt 1: `tail -F {prepared}/runs/r/attempt_1/driver.log`" in found.err
    assert "validation: none" in found.err
    assert f"done: 3 steps; checkpoints in {prepared}/checkpoints/tiny/r" in found.err
    assert train(*TINY, "--name", "s", "--json").code == 0
    assert isinstance(launched[1][1], JsonDisplay)


def test_a_resumed_launch(train: Train, prepared: Path, launched: list[Any]) -> None:
    (prepared / "runs/r/attempt_1").mkdir(parents=True)
    step = saved_step(prepared / "checkpoints/tiny/r", 5, world_size=1)
    torn = saved_step(prepared / "checkpoints/tiny/r", 10, world_size=1)
    (torn / "data.pt").unlink()
    found = train(*AGAIN)
    assert found.code == 0
    assert f"going on from step 5: {step}" in found.err
    assert "setting global_step_10 aside: incomplete: data.pt: missing" in found.err
    assert not torn.exists()
    assert train(*TINY, "--name", "r", "--resume", str(step)).code == 0
    (auto, *_), (path, *_) = launched
    assert (auto.attempt, path.attempt) == (2, 3)
    assert all(f"trainer.resume_from_path={step}" in plan.argv for plan in (auto, path))
    record = store.load(prepared / "runs/r/run.json")
    assert record
    assert [(one.number, one.status, one.resumed_from) for one in record.attempts] == [(2, "done", 5), (3, "done", 5)]
    assert record.attempts[0].set_aside == ("global_step_10: incomplete: data.pt: missing",)


def test_a_complete_run_is_left_alone(train: Train, prepared: Path, launched: list[Any]) -> None:
    saved_step(prepared / "checkpoints/tiny/r", 15, world_size=1)
    found = train(*AGAIN)
    assert (found.code, launched) == (0, [])
    assert "run r is complete: 15 steps" in found.err


def test_another_configuration_needs_force(train: Train, prepared: Path, launched: list[Any]) -> None:
    assert train(*AGAIN).code == 0
    files.write_json(launched[0][0].attempt_paths.plan, plan_document(launched[0][0]))
    longer = ("--set", "trainer.steps=30", "--set", "watch.max_kl=0.9")
    assert train(*AGAIN, *longer).code == 0, "how long it runs and how it is watched is free"
    found = train(*AGAIN, "--set", "algorithm.lr=5e-5", "--tis", "4")
    assert found.code == 2
    for text in (
        "run r was started with another configuration", "0.0001 → 5e-5", "correction.cap: 2.0 → 4.0", "--force",
    ):  # fmt: skip
        assert text in found.err
    assert train(*AGAIN, "--set", "algorithm.lr=5e-5", "--dry-run").code == 0
    assert train(*AGAIN, "--set", "algorithm.lr=5e-5", "--force").code == 0
    assert len(launched) == 3


def test_a_run_under_way_is_not_started_twice(train: Train, prepared: Path, launched: list[Any]) -> None:
    assert train(*TINY, "--name", "r").code == 0
    store.renew(launched[0][0].paths, 1, status="running")
    (prepared / "data").rename(prepared / "away")
    found = train(*AGAIN)
    assert found.code == 2, "before the machine is checked"
    assert "run r is under way: attempt 1, process" in found.err
    assert "flashrl runs stop r" in found.err
    (prepared / "away").rename(prepared / "data")
    store.renew(launched[0][0].paths, 1, pid_started=1.0)
    assert train(*AGAIN).code == 0, "its process is gone"


@pytest.mark.parametrize(
    ("error", "code"),
    [(RunFailed("it broke", hint="fix it"), 1), (Interrupted(2, "go on"), 130), (Interrupted(15, "go on"), 143)],
)
def test_exit_codes(error: Exception, code: int, train: Train, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise error

    monkeypatch.setattr(run, "supervise", fail)
    found = train(*TINY)
    assert found.code == code
    assert f"error: {error}" in found.err
    assert "hint: " in found.err
    assert "done" not in found.err


# on a Ray cluster

RAY = ("--executor", "ray")


@pytest.mark.parametrize(("preset", "nodes"), [("dapo-32b", 4), ("tiny", 1), ("gsm8k-0.5b", 1)])
def test_a_dry_run_shows_the_job(preset: str, nodes: int, train: Train, tmp_path: Path) -> None:
    document = train("--preset", preset, *RAY, "--ray-address", "http://head:8265", "--dry-run", "--json").document
    job = document["ray"]
    assert job["address"] == "http://head:8265"
    assert shlex.split(job["entrypoint"]) == ["exec", *document["argv"]]
    assert f"trainer.nnodes={nodes}" in document["overrides"]
    assert document["env"].items() <= job["runtime_env"]["env_vars"].items()
    assert not [override for override in document["overrides"] if "ray_init" in override]
    assert list(tmp_path.iterdir()) == []


def test_the_script_of_a_dry_run_submits(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    out = train("--preset", "dapo-32b", *RAY, "-n").out
    assert "exec ray job submit --no-wait \\\n  --address http://head:8265 \\\n" in out
    assert out.rstrip().endswith('-m verl.trainer.main_ppo "$@"')
    assert "ray" not in train(*TINY, "-n", "--json").document, "a local dry run knows no cluster"


def test_a_sweep_is_planned_for_the_cluster(train: Train) -> None:
    points = train(*TINY, "--sweep", "tis=off,2", *RAY, "-n", "--json").document["points"]
    assert len(points) == 2
    assert not [o for point in points for o in point["plan"]["overrides"] if "ray_init" in o]


def test_no_job_server_answers(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> Any:
        raise EnvironmentNotReady(f"no Ray job server answers at {address}", hint="--ray-address http://HEAD:8265")

    monkeypatch.setattr(ray_job, "connect", refuse)
    found = train(*TINY, *RAY)
    assert found.code == 3
    assert "error: no Ray job server answers at http://127.0.0.1:8265" in found.err
    assert list(tmp_path.iterdir()) == []


def test_the_supervisor_starts_a_job(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, started = FakeJobs(), []

    def supervise(plan: Any, *_: Any, start: Any, **__: Any) -> int:
        plan.attempt_paths.plugins.mkdir(parents=True)
        started.append(start(plan))
        started[-1].kill()
        return 3

    monkeypatch.setattr(ray_job, "connect", lambda _: jobs)
    monkeypatch.setattr(ray_ready, "check", lambda *_: ray_ready.Readiness(shared=True, nodes=2))
    monkeypatch.setattr(run, "supervise", supervise)
    found = train(*TINY, "--name", "r", *RAY)
    assert found.code == 0
    assert "asking every node of the Ray cluster at http://127.0.0.1:8265" in found.err
    last = json.loads(Path("runs/r/run.json").read_text(encoding="utf-8"))["attempts"][-1]
    assert (last["executor"], last["job_id"], last["status"]) == ("ray", started[0].id, "done")


# sweeps

SWEEP = (
    *(*TINY, "--name", "s", "--set", "trainer.steps=3"),
    *("--sweep", "rollout=bf16,int8", "--sweep", "tis=2"),
)
RUNS = ["s-bf16-tis2", "s-int8-tis2"]


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
            number=plan.attempt, status="failed" if error else "done", started="t", updated="t", last_step=steps,
            total_steps=3, error=error.message if error else None,
        )  # fmt: skip

        def edit(found: RunRecord | None) -> RunRecord:
            attempts = (*(found.attempts if found else ()), attempt)
            return RunRecord(name=plan.name, project="p", preset="tiny", created="t", checkpoints="", attempts=attempts)

        store.change(plan.paths, edit)
        if error:
            raise error
        return steps

    @property
    def trained(self) -> list[str]:
        return [plan.name for plan in self.plans]


@pytest.fixture
def trainer(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """What trains the runs of a sweep; there is the data of tiny, and no time for verl's tree."""

    from omegaconf import OmegaConf

    tree = Tree(OmegaConf.create({"actor_rollout_ref": {"rollout": {"val_kwargs": {"n": 1}}}}))

    def judge(resolved: Resolved, plan: LaunchPlan) -> Tree:
        resolved.checked()
        return tree

    made = Trainer()
    monkeypatch.setattr(launch, "judge", judge)
    monkeypatch.setattr(run, "run_plan", made)
    return made


def test_a_sweeps_dry_run_shows_the_runs_and_starts_none(train: Train, trainer: Trainer, tmp_path: Path) -> None:
    before = tree(tmp_path)
    found = train(*SWEEP, "--dry-run")
    assert tree(tmp_path) == before
    assert (found.code, trainer.plans) == (0, [])
    assert [line.split() for line in found.out.splitlines() if "s-" in line] == [
        ["bf16", "2", "s-bf16-tis2", "waiting", "–"],
        ["int8", "2", "s-int8-tis2", "waiting", "–"],
    ]
    document = train(*SWEEP, "--dry-run", "--json").document
    assert document["schema_version"] == 1
    assert [point["run"] for point in document["points"]] == RUNS
    first = document["points"][0]
    assert (first["values"], first["state"]) == ({"rollout": "bf16", "tis": 2}, "waiting")
    assert first["plan"]["name"] == "s-bf16-tis2"
    assert first["plan"]["spec"]["rollout"]["precision"] == "bf16"


def test_a_sweep_runs_in_order_and_shows_its_table(train: Train, trainer: Trainer) -> None:
    found = train(*SWEEP)
    assert (found.code, trainer.trained) == (0, RUNS)
    assert "[1/2] rollout=bf16 tis=2: run s-bf16-tis2 starts" in found.err
    rows = [line.split() for line in found.out.splitlines() if "s-" in line]
    assert rows[0][:6] == ["bf16", "2", "s-bf16-tis2", "done", "3/3", "0.5"]
    assert rows[1][:6] == ["int8", "2", "s-int8-tis2", "done", "3/3", "0.75"]
    assert ("★" in rows[0], rows[1][-1]) == (False, "★")


def test_a_sweep_for_a_program(train: Train, trainer: Trainer) -> None:
    events = train(*SWEEP, "--json").events
    assert [event["event"] for event in events] == ["point", "result", "point", "result", "sweep"]
    point = {"schema_version": 1, "event": "point", "number": 1, "of": 2, "run": "s-bf16-tis2", "doing": "starts"}
    assert events[0] == point
    last = events[-1]
    assert (last["best"], [point["reward"] for point in last["points"]]) == ("s-int8-tis2", [0.5, 0.75])
    assert events[3].items() >= last["points"][1].items()


def test_the_same_command_goes_on_and_shows_the_table_again(train: Train, trainer: Trainer) -> None:
    trainer.errors["s-int8-tis2"] = Interrupted(2, "as `train` says it")
    found = train(*SWEEP)
    assert found.code == 130
    assert "s-bf16-tis2" in found.out
    assert "error: stopped by SIGINT" in found.err
    assert "hint: the same command goes on with run s-int8-tis2" in found.err
    trainer.errors.clear()
    found = train(*SWEEP)
    assert found.code == 0
    assert trainer.trained == [*RUNS, "s-int8-tis2"]
    assert trainer.plans[-1].attempt == 2
    assert "run s-bf16-tis2 is done" in found.err
    found = train(*SWEEP)
    assert (found.code, len(trainer.plans)) == (0, 3)
    assert "★" in found.out


def test_a_failure_does_not_end_a_sweep_but_by_fail_fast(train: Train, trainer: Trainer) -> None:
    trainer.errors["s-bf16-tis2"] = RunFailed("out of memory", hint="less")
    found = train(*SWEEP, "--fail-fast", "--json")
    assert (found.code, trainer.trained) == (1, RUNS[:1])
    assert [event["event"] for event in found.events] == ["point", "failed", "result", "sweep"]
    assert found.events[1]["error"] == "out of memory"
    assert [point["state"] for point in found.events[-1]["points"]] == ["failed", "waiting"]
    found = train(*SWEEP)
    assert (found.code, trainer.trained) == (1, [*RUNS[:1], *RUNS])
    assert "warning: run s-bf16-tis2 failed: out of memory" in found.err
    assert "error: 1 of 2 runs failed: s-bf16-tis2" in found.err
    assert "failed" in found.out


def test_a_machine_that_cannot_run_one_of_them_starts_none(train: Train, trainer: Trainer, tmp_path: Path) -> None:
    found = train(*TINY, "--sweep", "rollout=int8,fp8")
    assert (found.code, trainer.plans) == (3, [])
    assert "FP8 rollouts need a GPU (compute capability 8.9 or newer) (with rollout=fp8)" in found.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("words", "code", "started"), [([], 2, 0), (["--yes"], 0, 2), (["--dry-run"], 0, 0)])
def test_many_runs_are_started_when_meant(
    words: list[str], code: int, started: int, train: Train, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_axes, "MANY", 1)
    assert train(*SWEEP, *words).code == code
    assert len(trainer.plans) == started


def test_a_detached_sweep(train: Train, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def detach(at: RunPaths, command: Sequence[str]) -> Attempt:
        asked.append(at.name)
        assert command[:3] == ["train", "--preset", "tiny"]
        return Attempt(number=1, status="running", started="t", updated="t", pid=7)

    monkeypatch.setattr(run, "detach", detach)
    found = train(*SWEEP, "--detach")
    assert (found.code, asked, trainer.plans) == (0, ["s-bf16-tis2"], [])
    assert "goes on as process 7" in found.err
    (event,) = train(*SWEEP, "--detach", "--json").events
    assert event == {"schema_version": 1, "event": "detached", "name": "s-bf16-tis2", "attempt": 1, "pid": 7}


def test_a_sweep_of_another_configuration_goes_on_by_force(train: Train, trainer: Trainer) -> None:
    trainer.errors["s-bf16-tis2"] = RunFailed("broke", hint="fix it")
    assert train(*SWEEP).code == 1
    changed = (*SWEEP, "--set", "algorithm.lr=0.25")
    found = train(*changed)
    assert (found.code, len(trainer.plans)) == (2, 2)
    assert "run s-bf16-tis2 was started with another configuration: algorithm.lr" in found.err
    assert "run s-int8-tis2 was started with another configuration: algorithm.lr" in found.err
    trainer.errors.clear()
    assert train(*changed, "--force").code == 0
    assert trainer.trained[2:] == ["s-bf16-tis2"]


def test_a_sweeps_file(train: Train, trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "grid: {rollout: [bf16, int8]}\nzip:\n- {tis: [1, 2], algorithm.lr: [1e-4, 2e-4]}\n"
    )
    assert train(*TINY, "--sweep", "s.yaml").code == 0
    assert trainer.trained == [
        "tiny-bf16-tis1-lr1e-4",
        "tiny-bf16-tis2-lr2e-4",
        "tiny-int8-tis1-lr1e-4",
        "tiny-int8-tis2-lr2e-4",
    ]

"""A run is followed to its end, ended when it must be, and leaves nothing behind; a small script stands in for verl."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.contract import Handshake, write_handshake
from flashrl_cli.errors import EnvironmentNotReady, ExitCode, RunFailed
from flashrl_cli.launch import proof, supervise
from flashrl_cli.launch.plan import LaunchPlan, build_plan, plan_document
from flashrl_cli.launch.process import Tree
from flashrl_cli.verl.metrics import StepMetrics

PRELUDE = '''
import json, os, signal, sys, time
from pathlib import Path
from flashrl_cli.contract import Handshake, plugin_dir, write_handshake

HERE = Path(__file__).parent
SPARED = signal.SIG_IGN

def log(text):
    print(text, flush=True)

def step(number, **data):
    data = {"actor/grad_norm": 0.5, "actor/pg_loss": 0.1, "critic/score/mean": 0.3, **{k.replace("__", "/"): v for k, v in data.items()}}
    with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as stream:
        stream.write(json.dumps({"step": number, "data": data}) + "\\n")

def shake(precision="int8"):
    write_handshake(plugin_dir(), Handshake(
        host="h", pid=1, precision=precision, quantized_layers=14 * (precision != "bf16"), linear_layers=15, quantized_bytes=9,
        kernel="K", vllm="0", torch="2", device="cpu", refits=1, refit_s=0.1))

def ready(name):
    (HERE / name).write_text(str(os.getpid()))

def settled(name):
    while not (HERE / name).exists():
        time.sleep(0.01)

def daemon():
    """As Ray does it: a session of its own, and a parent that is gone."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            ready("daemon")
            time.sleep(120)
        os._exit(0)
    os.wait()
    settled("daemon")

def stubborn():
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, SPARED)
        ready("stubborn")
        time.sleep(120)
        os._exit(0)
    settled("stubborn")

def signal_flashrl(number):
    os.kill(os.getppid(), number)

daemon()
stubborn()
'''
LIMITS = {"start_timeout_s": 60, "step_timeout_s": 60, "failure_grace_s": 60, "stop_grace_s": 5}


class Recorder:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.proofs: list[list[Handshake]] = []
        self.steps: list[int] = []
        self.total: int | None = None
        self.ticks = 0

    def expect(self, total: int) -> None:
        self.total = total

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def proven(self, shakes: list[Handshake]) -> None:
        self.proofs.append(shakes)

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics.step)

    def tick(self) -> None:
        self.ticks += 1


def tiny_plan(root: Path, *sets: str, **watch: float) -> LaunchPlan:
    clocks = [f"watch.{key}={value}" for key, value in (LIMITS | watch).items()]
    return build_plan(
        load_spec("tiny", sets=[*sets, *clocks]),
        name="r",
        attempt=1,
        python=sys.executable,
        runs_root=root / "runs",
        checkpoints_root=root / "checkpoints",
        data_root=root / "data",
    )


def processes_of(folder: Path) -> list[psutil.Process]:
    """Everything that runs a script of `folder`, wherever it was moved to."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if any(str(folder) in word for word in process.info["cmdline"] or ())
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run(script, display, **watch)` supervises the script; afterwards none of its processes may be left."""
    kill = Tree.kill

    def soon(tree: Tree, *, grace_s: float = 0.0) -> None:
        kill(tree, grace_s=min(grace_s, 0.2))  # every script has a child that uses up the whole grace

    monkeypatch.setattr(Tree, "kill", soon)
    monkeypatch.setattr(supervise, "POLL_S", 0.05)

    def start(script: str, display: Recorder, *, vocabulary: int | None = None, **watch: float) -> int:
        file = tmp_path / "verl.py"
        file.write_text(PRELUDE + textwrap.dedent(script))
        plan = dataclasses.replace(tiny_plan(tmp_path, **watch), argv=(sys.executable, str(file)))
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            return supervise.supervise(plan, display, vocabulary=vocabulary)
        finally:
            left = processes_of(tmp_path)
            for process in left:
                process.kill()
            assert left == []
            assert (tmp_path / "daemon").exists()
            assert (tmp_path / "stubborn").exists()
            assert handlers == {number: signal.getsignal(number) for number in handlers}

    return start


@pytest.mark.processes
def test_success(run: Callable[..., int], tmp_path: Path) -> None:
    seen = Recorder()
    script = """
    log("\\x1b[36m(Runner pid=7)\\x1b[0m Total training steps: 2")
    log("checkpoint engine manager initialized")
    shake()
    step(0)
    step(1)
    step(2)
    """
    assert run(script, seen) == 2
    assert seen.steps == [0, 1, 2]
    assert seen.total == 2
    assert seen.phases == ["starting verl", "loading the checkpoint"]
    assert [[shake.precision for shake in shakes] for shakes in seen.proofs] == [["int8"]]
    assert seen.ticks
    attempt = tmp_path / "runs/r/attempt_1"
    document = json.loads((attempt / "plan.json").read_text())
    assert document["argv"] == [sys.executable, str(tmp_path / "verl.py")]
    assert document.keys() == plan_document(tiny_plan(tmp_path)).keys()
    assert "Total training steps: 2" in (attempt / "driver.log").read_text()


@pytest.mark.processes
def test_other_precision_than_asked_for_ends_the_run_before_its_first_step(run: Callable[..., int]) -> None:
    seen = Recorder()
    with pytest.raises(EnvironmentNotReady, match="int8 rollouts were asked for, but worker 1 on h holds bf16") as caught:
        run('log("loading weights")\nshake("bf16")\ntime.sleep(120)', seen)
    assert seen.steps == []
    assert seen.proofs == []
    assert "--rollout bf16" in str(caught.value.hint)
    assert "  | loading weights\nlog: " in caught.value.message


@pytest.mark.processes
def test_step_without_a_proof_ends_the_run(run: Callable[..., int]) -> None:
    with pytest.raises(EnvironmentNotReady, match="0 of 1 workers proved theirs") as caught:
        run("step(1)\ntime.sleep(120)", Recorder())
    assert "plugins" in str(caught.value.hint)


@pytest.mark.processes
def test_nan_ends_the_run(run: Callable[..., int]) -> None:
    seen = Recorder()
    with pytest.raises(RunFailed, match="step 2: NaN in grad_norm\n"):
        run("shake(); step(1); step(2, actor__grad_norm=None); time.sleep(120)", seen)
    assert seen.steps == [1, 2]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ("rollout_corr__kl=3.7, rollout_corr__rollout_is_mean=0.08", r"KL between rollout and trainer is 3\.7"),
        ("rollout_corr__kl=0.01, rollout_corr__rollout_is_mean=0.08", r"importance weights' mean is 0\.08"),
        (
            "rollout_corr__kl=0.01, rollout_corr__rollout_log_ppl=5.557, rollout_corr__training_log_ppl=0.4",
            r"samples uniformly: mean log-prob -5\.56 = -ln\(259\)",
        ),
    ],
)
def test_rollout_that_does_not_sample_from_the_policy_ends_the_run(
    metrics: str, told: str, run: Callable[..., int]
) -> None:
    with pytest.raises(EnvironmentNotReady, match=f"step 1: the rollout engine does not sample.*{told}") as caught:
        run(f"shake()\nstep(1, {metrics})\ntime.sleep(120)", Recorder(), vocabulary=259)
    assert "no mismatch for TIS" in str(caught.value.hint)


@pytest.mark.processes
def test_failure_is_told_with_cause_hint_and_the_logs_end(run: Callable[..., int], tmp_path: Path) -> None:
    script = """
    for number in range(30):
        log(f"line {number}")
    log("\\x1b[31mRuntimeError: CUDA out of memory. Tried to allocate 2 GiB\\x1b[0m")
    log("the last word")
    sys.exit(1)
    """
    with pytest.raises(RunFailed) as caught:
        run(script, Recorder())
    first, *tail, last = caught.value.message.splitlines()
    assert first == "a GPU ran out of memory"
    assert "rollout.gpu_memory_utilization" in str(caught.value.hint)
    assert tail[0] == "  | line 12"
    assert tail[-2:] == ["  | RuntimeError: CUDA out of memory. Tried to allocate 2 GiB", "  | the last word"]
    assert last == f"log: {tmp_path}/runs/r/attempt_1/driver.log"


@pytest.mark.processes
def test_failure_whose_last_line_has_no_end_is_told(run: Callable[..., int]) -> None:
    with pytest.raises(RunFailed, match="a GPU ran out of memory") as caught:
        run('sys.stdout.write("CUDA out of memory")\nsys.stdout.flush()\nsys.exit(1)', Recorder())
    assert "  | CUDA out of memory" in caught.value.message


@pytest.mark.processes
def test_failure_without_a_known_cause_tells_the_exit_code(run: Callable[..., int]) -> None:
    with pytest.raises(RunFailed, match="verl ended with exit code 7\n  | hm\n"):
        run('log("hm")\nsys.exit(7)', Recorder())


@pytest.mark.processes
def test_run_that_hangs_after_a_fatal_line_is_ended(run: Callable[..., int]) -> None:
    with pytest.raises(RunFailed, match="a worker of the rollout engine died"):
        run('log("Worker proc VllmWorker-0 died unexpectedly")\ntime.sleep(120)', Recorder(), failure_grace_s=0.3)


@pytest.mark.processes
def test_start_without_progress_is_ended(run: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="no progress for 5 s during the start") as caught:
        run("time.sleep(120)", Recorder(), start_timeout_s=5)
    assert "watch.start_timeout_s" in str(caught.value.hint)


@pytest.mark.processes
def test_step_without_progress_is_ended(run: Callable[..., int]) -> None:
    seen = Recorder()
    with pytest.raises(RunFailed, match=r"no progress for 0\.3 s during a step") as caught:
        run("shake()\nstep(1)\ntime.sleep(120)", seen, step_timeout_s=0.3)
    assert seen.steps == [1]
    assert "watch.step_timeout_s" in str(caught.value.hint)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGINT", ExitCode.INTERRUPTED), ("SIGTERM", ExitCode.TERMINATED), ("SIGHUP", ExitCode.TERMINATED)],
)
def test_signal_ends_the_run_in_order(name: str, code: ExitCode, run: Callable[..., int], tmp_path: Path) -> None:
    script = f"""
    def goodbye(*_):
        ready("asked")
        sys.exit(0)
    signal.signal(signal.SIGTERM, goodbye)
    signal_flashrl(signal.{name})
    time.sleep(120)
    """
    with pytest.raises(supervise.Interrupted, match=f"stopped by {name}") as caught:
        run(script, Recorder())
    assert caught.value.exit_code == code == {"SIGINT": 130}.get(name, 143)
    assert "--resume auto --name r" in str(caught.value.hint)
    assert (tmp_path / "asked").exists(), "verl is asked to end before it is killed"


@pytest.mark.processes
def test_second_signal_makes_short_work(run: Callable[..., int]) -> None:
    script = """
    signal.signal(signal.SIGTERM, lambda *_: signal_flashrl(signal.SIGINT))
    signal_flashrl(signal.SIGINT)
    while True:
        time.sleep(120)
    """
    started = time.monotonic()
    with pytest.raises(supervise.Interrupted):
        run(script, Recorder(), stop_grace_s=300)
    assert time.monotonic() - started < 60


@pytest.mark.processes
def test_child_that_ignores_the_request_to_end_is_killed(run: Callable[..., int]) -> None:
    script = """
    signal.signal(signal.SIGTERM, SPARED)
    signal_flashrl(signal.SIGTERM)
    time.sleep(120)
    """
    with pytest.raises(supervise.Interrupted):
        run(script, Recorder(), stop_grace_s=0.3)


@pytest.mark.processes
@pytest.mark.parametrize("script", ["", "shake()\nstep(0)"])
def test_end_without_a_training_step_is_a_failure(script: str, run: Callable[..., int]) -> None:
    with pytest.raises(RunFailed, match="verl ended without a step") as caught:
        run(script, Recorder())
    assert "trainer.steps" in str(caught.value.hint)


@pytest.mark.processes
def test_used_attempt_is_not_written_to(run: Callable[..., int], tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path)
    plan.attempt_paths.plugins.mkdir(parents=True)
    with pytest.raises(FileExistsError):
        supervise.supervise(plan, Recorder())
    assert list(plan.attempt_paths.root.iterdir()) == [plan.attempt_paths.plugins]


# From here on a clock that the test moves, and no process at all.


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class NoTree:
    """Nothing that runs."""

    def processes(self) -> list[Any]:
        return []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(supervise, "time", found)
    return found


def watching(plan: LaunchPlan) -> tuple[supervise.Watch, Recorder]:
    plan.attempt_paths.plugins.mkdir(parents=True)
    seen = Recorder()
    return supervise.Watch(plan, seen, cast("Tree", NoTree()), None), seen


def add(path: Path, text: str) -> None:
    with path.open("a") as stream:
        stream.write(f"{text}\n")


def int8_shake() -> Handshake:
    return Handshake(
        host="h",
        pid=1,
        precision="int8",
        quantized_layers=14,
        linear_layers=15,
        quantized_bytes=9,
        kernel="K",
        vllm="0",
        torch="2",
        device="cpu",
        refits=1,
        refit_s=0.1,
    )


def line(step: int) -> str:
    return json.dumps({"step": step, "data": {}})


def test_each_phase_of_a_start_gets_the_whole_time(tmp_path: Path, clock: Clock) -> None:
    plan = tiny_plan(tmp_path, start_timeout_s=10)
    watch, _ = watching(plan)
    for text in ("Started a local Ray instance", "create worker group", "all initialize finished, ready to fit"):
        clock.now += 9
        add(plan.attempt_paths.log, text)
        watch.look()
    add(plan.attempt_paths.log, "no phase at all")
    clock.now += 11
    with pytest.raises(RunFailed, match="no progress for 10 s during the start"):
        watch.look()


def test_validation_before_training_is_progress_but_no_step(tmp_path: Path, clock: Clock) -> None:
    plan = tiny_plan(tmp_path, start_timeout_s=10, step_timeout_s=1)
    watch, seen = watching(plan)
    clock.now += 9
    add(plan.attempt_paths.metrics, line(0))
    watch.look()
    clock.now += 9
    watch.look()
    assert (watch.steps, seen.steps) == (0, [0])


def test_each_step_gets_the_whole_time(tmp_path: Path, clock: Clock) -> None:
    plan = tiny_plan(tmp_path, step_timeout_s=10)
    write_handshake(plan.attempt_paths.plugins, int8_shake())
    seen = Recorder()
    watch = supervise.Watch(plan, seen, cast("Tree", NoTree()), None)
    for step in (11, 12, 13):
        clock.now += 9
        add(plan.attempt_paths.metrics, line(step))
        watch.look()
    assert watch.steps == 3, "steps of this attempt, not the run's number"
    clock.now += 11
    add(plan.attempt_paths.log, "create worker group")  # says nothing after the first step
    with pytest.raises(RunFailed, match="during a step"):
        watch.look()
    assert seen.phases == []


def test_verl_has_its_grace_after_a_fatal_line_and_the_first_cause_counts(tmp_path: Path, clock: Clock) -> None:
    plan = tiny_plan(tmp_path, failure_grace_s=10)
    watch, _ = watching(plan)
    add(plan.attempt_paths.log, "OSError: [Errno 28] No space left on device")
    watch.look()
    clock.now += 9
    add(plan.attempt_paths.log, "ray.exceptions.ActorDiedError: gone")
    watch.look()
    clock.now += 2
    with pytest.raises(RunFailed, match="a disk is full"):
        watch.look()


def test_every_worker_must_prove_itself(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, "resources.gpus_per_node=2")
    watch, seen = watching(plan)
    write_handshake(plan.attempt_paths.plugins, int8_shake())
    watch.look()
    assert seen.proofs == []
    add(plan.attempt_paths.metrics, line(1))
    with pytest.raises(EnvironmentNotReady, match="1 of 2 workers proved theirs"):
        watch.look()


def test_proof_that_arrives_with_the_first_step_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last handshake may be written between the look at the proofs and the look at the metrics."""
    plan = tiny_plan(tmp_path)
    watch, seen = watching(plan)
    add(plan.attempt_paths.metrics, line(1))
    looks = iter([[]])
    monkeypatch.setattr(proof, "read", lambda _: next(looks, [int8_shake()]))
    watch.look()
    watch.look()
    assert seen.steps == [1]
    assert len(seen.proofs) == 1

"""A run is followed to its end, ended when it must be, and leaves nothing behind.

First with processes: a small script in place of verl; then by a clock that the test moves; then the bounds of a healthy
rollout.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from flashrl_cli import contract
from flashrl_cli.config.spec import CorrectionSpec, RejectSpec, WatchSpec
from flashrl_cli.contract import Handshake, write_handshake
from flashrl_cli.errors import EnvironmentNotReady, ExitCode, FlashrlError, RunFailed
from flashrl_cli.signals import Interrupted, collected
from flashrl_cli.train import supervise
from flashrl_cli.train.executors import start_here
from flashrl_cli.train.plan import LaunchPlan, plan_document
from flashrl_cli.train.process import Tree
from flashrl_cli.verl.metrics import StepMetrics, read_step
from tests.conftest import starting_with
from tests.unit.runs.on_disk import by_staleness
from tests.unit.train.builders import Clock, handshake

Plan = Callable[..., LaunchPlan]

PRELUDE = '''
import json, os, signal, sys, time
from pathlib import Path
from flashrl_cli.contract import Handshake, plugin_dir, write_handshake

HERE = Path(__file__).parent
SPARED = signal.SIG_IGN

def log(text):
    print(text, flush=True)

def step(number, **data):
    given = {k.replace("__", "/"): v for k, v in data.items()}
    data = {"actor/grad_norm": 0.5, "actor/pg_loss": 0.1, "critic/score/mean": 0.3, **given}
    if number == 0:
        data = {"val-core/tiny/acc/mean@1": 0.5}
    with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as stream:
        stream.write(json.dumps({"step": number, "data": data}) + "\\n")

def handshake(precision="int8"):
    write_handshake(plugin_dir(), Handshake(
        host="h", pid=1, precision=precision, quantized_layers=14 * (precision != "bf16"), linear_layers=15,
        quantized_bytes=9, rotation=64,
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

def flashrl():
    guardian = Path(f"/proc/{os.getppid()}/stat").read_text()
    return int(guardian.rpartition(")")[2].split()[1])

# asked now: once the guardian has ended, the same question names flashrl's own parent, which is the whole test run
FLASHRL = flashrl()

def signal_flashrl(number):
    os.kill(FLASHRL, number)

daemon()
stubborn()
'''


def processes_of(folder: Path) -> list[psutil.Process]:
    """Everything that runs a script of `folder`, wherever it was moved to."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if any(str(folder) in word for word in process.info["cmdline"] or ())
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any, tiny_plan: Plan) -> Callable[..., int]:
    """`run(script, **watch)` supervises the script; afterwards none of its processes may be left."""
    kill = Tree.kill

    def soon(tree: Tree, *, grace_s: float = 0.0) -> None:
        kill(tree, grace_s=min(grace_s, 0.2))  # every script has a child that uses up the whole grace

    monkeypatch.setattr(Tree, "kill", soon)
    monkeypatch.setattr(supervise, "POLL_S", 0.05)

    def start(script: str, *, vocabulary: int | None = None, validates: str = "", **watch: float) -> int:
        file = tmp_path / "verl.py"
        file.write_text(PRELUDE + textwrap.dedent(script))
        plan = dataclasses.replace(tiny_plan(**watch), argv=(sys.executable, str(file)))
        if validates:
            trainer = plan.spec.trainer.model_copy(update={"validate_before": True})
            spec = plan.spec.model_copy(update={"trainer": trainer})
            plan = dataclasses.replace(plan, resolved=dataclasses.replace(plan.resolved, spec=spec))
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            with starting_with(signal.SIG_DFL, signal.SIGHUP), collected() as received:
                return supervise.supervise(
                    plan, seen, received, start=start_here, vocabulary=vocabulary, validates=validates
                )
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
def test_who_waits_for_a_validation_sees_how_much_it_generates(run: Callable[..., int], seen: Any) -> None:
    script = """
    log("Creating file logger at /x")
    log("('Initial validation metrics: {...}')")
    handshake()
    step(0)
    step(1)
    """
    assert run(script, validates="1,319 prompts of gsm8k") == 1
    validating = "validating the starting policy: 1,319 prompts of gsm8k"
    assert seen.phases == ["starting verl", validating, "sampling responses"]


@pytest.mark.processes
def test_success(run: Callable[..., int], tmp_path: Path, seen: Any, tiny_plan: Plan) -> None:
    script = """
    log("\\x1b[36m(Runner pid=7)\\x1b[0m Total training steps: 2")
    log("checkpoint engine manager initialized")
    handshake()
    step(0)
    step(1)
    step(2)
    """
    assert run(script) == 2
    assert seen.steps == [0, 1, 2]
    assert seen.total == 2
    assert seen.phases == ["starting verl", "loading the checkpoint"]
    assert [[handshake.precision for handshake in handshakes] for handshakes in seen.proofs] == [["int8"]]
    assert seen.ticks
    attempt = tmp_path / "runs/r/attempt_1"
    document = json.loads((attempt / "plan.json").read_text())
    assert document["argv"] == [sys.executable, str(tmp_path / "verl.py")]
    assert document.keys() == plan_document(tiny_plan()).keys()
    assert "Total training steps: 2" in (attempt / "driver.log").read_text()


HANGS = "\ntime.sleep(120)"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("script", "limits", "error", "message", "hint", "steps"),
    [
        (
            'log("loading weights")\nhandshake("bf16")' + HANGS, {}, EnvironmentNotReady,
            r"int8 rollouts were asked for, but worker 1 on h holds bf16 .*\n  \| loading weights\nlog: ",
            "--rollout bf16", [],
        ),
        ("step(1)" + HANGS, {}, EnvironmentNotReady, "0 of 1 workers proved theirs", "plugins", [1]),
        (
            "handshake(); step(1); step(2, actor__grad_norm=None)" + HANGS, {}, RunFailed, "step 2: NaN in grad_norm\n",
            "learning rate", [1, 2],
        ),
        (
            "handshake(); step(1, rollout_corr__kl=3.7, rollout_corr__rollout_is_mean=0.08)" + HANGS, {},
            EnvironmentNotReady, r"step 1: the rollout engine does not sample.*KL between rollout and trainer is 3\.7",
            "no mismatch for TIS", [1],
        ),
        (
            "handshake(); step(1, rollout_corr__rollout_log_ppl=5.557, rollout_corr__training_log_ppl=0.4)" + HANGS, {},
            EnvironmentNotReady, r"samples uniformly: mean log-prob -5\.56 = -ln\(259\)", "no mismatch for TIS", [1],
        ),
        (
            'sys.stdout.write("CUDA out of memory")\nsys.stdout.flush()\nsys.exit(1)', {}, RunFailed,
            r"a GPU ran out of memory.*\n  \| CUDA out of memory", "rollout.gpu_memory_utilization", [],
        ),
        (
            (
                'log("OSError: [Errno 28] No space left on device")\n'
                'log("ray.exceptions.ActorDiedError: gone")\nsys.exit(1)'
            ),
            {}, RunFailed, "a disk is full", "", [],
        ),
        ('log("hm")\nsys.exit(7)', {}, RunFailed, r"verl ended with exit code 7\n  \| hm\n", "the log's end", []),
        (
            'log("Worker proc VllmWorker-0 died unexpectedly")' + HANGS, {"failure_grace_s": 0.3}, RunFailed,
            "a worker of the rollout engine died", "", [],
        ),
        (
            HANGS, {"start_timeout_s": 5}, RunFailed, r"no progress for 5 s during the start \(starting verl\)",
            "watch.start_timeout_s", [],
        ),
        (
            "handshake()\nstep(1)" + HANGS, {"step_timeout_s": 0.3}, RunFailed, r"no progress for 0\.3 s during a step",
            "watch.step_timeout_s", [1],
        ),
        ("", {}, RunFailed, "verl ended without a step", "trainer.steps", []),
        ("handshake()\nstep(0)", {}, RunFailed, "verl ended without a step", "trainer.steps", [0]),
        (
            'log("Total training steps: 3")\nhandshake()\nstep(1)\nstep(2)', {},
            RunFailed, "verl ended after step 2 of 3", "trainer.epochs", [1, 2],
        ),
    ],
)  # fmt: skip
def test_what_ends_a_run(
    script: str,
    limits: dict[str, float],
    error: type[FlashrlError],
    message: str,
    hint: str,
    steps: list[int],
    run: Callable[..., int],
    seen: Any,
) -> None:
    with pytest.raises(error, match=f"(?s){message}") as caught:
        run(script, vocabulary=259, **limits)
    assert hint in str(caught.value.hint)
    assert seen.steps == steps
    assert bool(seen.proofs) == ("handshake()" in script)


@pytest.mark.processes
def test_a_failure_comes_with_cause_hint_and_the_logs_end(run: Callable[..., int], tmp_path: Path) -> None:
    script = """
    log("ray.exceptions.ActorDiedError: less specific than what follows")
    for number in range(30):
        log(f"line {number}")
    log("\\x1b[31mRuntimeError: CUDA out of memory. Tried to allocate 2 GiB\\x1b[0m")
    log("the last word".ljust(400, "."))
    sys.exit(1)
    """
    with pytest.raises(RunFailed) as caught:
        run(script)
    first, *tail, last = caught.value.message.splitlines()
    assert first == "a GPU ran out of memory"
    assert "rollout.gpu_memory_utilization" in str(caught.value.hint)
    assert tail[0] == "  | line 12"
    assert tail[-2:] == [
        "  | RuntimeError: CUDA out of memory. Tried to allocate 2 GiB",
        "  | " + "the last word".ljust(300, "."),
    ]
    assert last == f"log: {tmp_path}/runs/r/attempt_1/driver.log"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGINT", ExitCode.INTERRUPTED), ("SIGTERM", ExitCode.TERMINATED), ("SIGHUP", ExitCode.TERMINATED)],
)
def test_signal_ends_the_run_in_order(name: str, code: ExitCode, run: Callable[..., int], tmp_path: Path) -> None:
    script = f"""
    def goodbye(*_):
        time.sleep(0.6)  # longer than what is left to others when all is killed
        ready("asked")
        sys.exit(0)
    signal.signal(signal.SIGTERM, goodbye)
    signal_flashrl(signal.{name})
    time.sleep(120)
    """
    with pytest.raises(Interrupted, match=f"stopped by {name}") as caught:
        run(script, stop_grace_s=30)
    assert caught.value.exit_code == code == {"SIGINT": 130}.get(name, 143)
    assert "--resume auto --name r" in str(caught.value.hint)
    assert (tmp_path / "asked").exists(), "verl is asked to end before it is killed"


@pytest.mark.processes
def test_second_signal_makes_short_work(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    kill, graces = Tree.kill, list[float]()

    def noted(tree: Tree, *, grace_s: float = 0.0) -> None:
        graces.append(grace_s)
        kill(tree, grace_s=grace_s)

    monkeypatch.setattr(Tree, "kill", noted)
    script = """
    def again(*_):
        signal.signal(signal.SIGTERM, SPARED)  # a later one would reach the tests after this one
        signal_flashrl(signal.SIGINT)
    signal.signal(signal.SIGTERM, again)
    signal_flashrl(signal.SIGINT)
    while True:
        time.sleep(120)
    """
    started = time.monotonic()
    with pytest.raises(Interrupted):
        run(script, stop_grace_s=300)
    assert time.monotonic() - started < 300
    assert graces == [0.0]


@pytest.mark.processes
def test_child_that_ignores_the_request_to_end_is_killed(run: Callable[..., int]) -> None:
    script = """
    signal.signal(signal.SIGTERM, SPARED)
    signal_flashrl(signal.SIGTERM)
    time.sleep(120)
    """
    with pytest.raises(Interrupted):
        run(script, stop_grace_s=0.3)


@pytest.mark.processes
def test_validation_after_a_resume_is_no_step(run: Callable[..., int], seen: Any) -> None:
    script = """
    log("Total training steps: 6")
    handshake()
    with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as stream:
        stream.write(json.dumps({"step": 5, "data": {"val-core/tiny/acc/mean@1": 0.5}}) + "\\n")
    step(6)
    """
    assert run(script) == 1
    assert seen.steps == [5, 6]


@pytest.mark.processes
def test_used_attempt_is_not_written_to(run: Callable[..., int], tmp_path: Path, seen: Any, tiny_plan: Plan) -> None:
    plan = tiny_plan()
    plan.attempt_paths.plugins.mkdir(parents=True)
    with pytest.raises(FileExistsError):
        supervise.supervise(plan, seen, [], start=start_here)
    assert list(plan.attempt_paths.root.iterdir()) == [plan.attempt_paths.plugins]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(supervise, "time", found)
    return found


def watching(plan: LaunchPlan, seen: Any) -> supervise.Watch:
    plan.attempt_paths.plugins.mkdir(parents=True, exist_ok=True)
    return supervise.Watch(plan, seen, cast("Tree", SimpleNamespace(tend=lambda: None)), None)


def add(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"{text}\n")


def line(step: int) -> str:
    return json.dumps({"step": step, "data": {}})


def test_each_phase_of_a_start_gets_the_whole_time(tiny_plan: Plan, seen: Any, clock: Clock) -> None:
    plan = tiny_plan(start_timeout_s=10)
    watch = watching(plan, seen)
    for text in ("Started a local Ray instance", "create worker group", "all initialize finished, ready to fit"):
        clock.now += 9
        add(plan.attempt_paths.log, text)
        watch.look()
    add(plan.attempt_paths.log, "no phase at all")
    clock.now += 11
    with pytest.raises(RunFailed, match="no progress for 10 s during the start"):
        watch.look()


def test_validation_before_training_is_progress_but_no_step(tiny_plan: Plan, seen: Any, clock: Clock) -> None:
    plan = tiny_plan(start_timeout_s=10, step_timeout_s=1)
    watch = watching(plan, seen)
    clock.now += 9
    add(plan.attempt_paths.metrics, line(0))
    watch.look()
    clock.now += 9
    watch.look()
    assert (watch.steps, seen.steps) == (0, [0])


def test_a_reward_that_is_the_same_for_all_responses_is_warned_of(tiny_plan: Plan, seen: Any, clock: Clock) -> None:
    plan = tiny_plan()
    write_handshake(plan.attempt_paths.plugins, handshake())
    watch = watching(plan, seen)
    rewards = [(0, 0), (0, 0), (0, 1), (0, 0), (0, 0), (0, 0), (0, 0), (0.5, 0.5), (0, 1), (1, 1), (1, 1)]
    for step, (least, largest) in enumerate(rewards, 1):
        data = {"critic/score/min": least, "critic/score/max": largest}
        add(plan.attempt_paths.metrics, json.dumps({"step": step, "data": data}))
        watch.look()
    assert seen.warnings == ["step 6: every response of 3 steps got the reward 0, from which nothing is learned"]


def test_each_step_gets_the_whole_time(tiny_plan: Plan, seen: Any, clock: Clock) -> None:
    plan = tiny_plan(step_timeout_s=10)
    write_handshake(plan.attempt_paths.plugins, handshake())
    watch = watching(plan, seen)
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


def test_verl_has_its_grace_after_a_fatal_line_and_the_first_cause_counts(
    tiny_plan: Plan, seen: Any, clock: Clock
) -> None:
    plan = tiny_plan(failure_grace_s=10)
    watch = watching(plan, seen)
    add(plan.attempt_paths.log, "OSError: [Errno 28] No space left on device")
    watch.look()
    clock.now += 9
    add(plan.attempt_paths.log, "ray.exceptions.ActorDiedError: gone")
    watch.look()
    clock.now += 2
    with pytest.raises(RunFailed, match="a disk is full"):
        watch.look()


def test_a_run_that_goes_on_after_a_fatal_line_is_not_ended(tiny_plan: Plan, seen: Any, clock: Clock) -> None:
    plan = tiny_plan(failure_grace_s=10)
    write_handshake(plan.attempt_paths.plugins, handshake())
    watch = watching(plan, seen)
    add(plan.attempt_paths.log, "ray.exceptions.ActorDiedError: gone")
    watch.look()
    add(plan.attempt_paths.metrics, line(1))
    watch.look()
    clock.now += 11
    watch.look()


def test_what_fails_after_the_last_step_is_no_failure(tiny_plan: Plan, seen: Any, clock: Clock) -> None:
    """Responses that an asynchronous mode sampled ahead fail when verl ends the engines."""
    plan = tiny_plan(failure_grace_s=10)
    write_handshake(plan.attempt_paths.plugins, handshake())
    watch = watching(plan, seen)
    add(plan.attempt_paths.log, "Total training steps: 2")
    for step in (1, 2):
        add(plan.attempt_paths.metrics, line(step))
    watch.look()
    add(plan.attempt_paths.log, "Error in _run_prompt for uid=1\nray.exceptions.ActorDiedError: gone")
    watch.look()
    clock.now += 11
    watch.look()


def test_dropped_groups_are_counted_and_warned_of(tiny_plan: Plan, seen: Any, clock: Clock) -> None:
    plan = tiny_plan()
    write_handshake(plan.attempt_paths.plugins, handshake())
    watch = watching(plan, seen)
    stale, failed = "training/off_policy/evicted_samples", "training/rollout_failure/evicted_samples"
    for step, data in enumerate(({}, {stale: 2}, {stale: 1}, {failed: 1.0}, {}), 1):
        add(plan.attempt_paths.metrics, json.dumps({"step": step, "data": data}))
        watch.look()
    first, second = seen.warnings
    assert first == "step 2: dropped so far: 2 groups older than trainer.max_staleness"
    assert second.startswith(
        "step 4: dropped so far: 3 groups older than trainer.max_staleness and 1 group with a resp"
    )


def test_every_worker_must_prove_itself(tiny_plan: Plan, seen: Any) -> None:
    plan = tiny_plan("resources.gpus_per_node=2")
    watch = watching(plan, seen)
    write_handshake(plan.attempt_paths.plugins, handshake())
    watch.look()
    assert seen.proofs == []
    add(plan.attempt_paths.metrics, line(1))
    with pytest.raises(EnvironmentNotReady, match="1 of 2 workers proved theirs"):
        watch.look()


def test_proof_that_arrives_with_the_first_step_counts(
    tiny_plan: Plan, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last handshake may be written between the look at the proofs and the look at the metrics."""
    plan = tiny_plan()
    watch = watching(plan, seen)
    add(plan.attempt_paths.metrics, line(1))
    looks: Iterator[list[Handshake]] = iter([[]])
    monkeypatch.setattr(contract, "read_handshakes", lambda _: next(looks, [handshake()]))
    watch.look()
    watch.look()
    assert seen.steps == [1]
    assert len(seen.proofs) == 1


BOUNDS = WatchSpec()
VOCABULARY = 259
UNIFORM = math.log(VOCABULARY)
HEALTHY: dict[str, float | None] = {
    "kl": 0.002,
    "weight_mean": 0.999,
    "prob_correlation": 0.958,
    "prob_diff": 0.02,
    "rollout_nll": 0.41,
    "train_nll": 0.412,
}


def judged(values: dict[str, float | None], vocabulary: int | None = VOCABULARY) -> str | None:
    step = StepMetrics(step=1, values=HEALTHY | values, seconds={}, accuracy=None, lost=())
    return supervise.broken_rollout(step, BOUNDS, vocabulary)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kl": 0.5},
        {"kl": -0.5},
        {"weight_mean": 1.5},
        {"weight_mean": 0.5},
        {"prob_correlation": 0.9, "prob_diff": 0.9},
        {"prob_correlation": 0.02, "prob_diff": 0.0004},
        {"prob_correlation": -0.1, "prob_diff": 0.05},
        dict.fromkeys(HEALTHY),
        {"kl": None, "weight_mean": None},
        {"prob_correlation": None, "prob_diff": 0.9},
        {"prob_correlation": 0.1, "prob_diff": None},
        {"rollout_nll": UNIFORM, "train_nll": UNIFORM - 0.01},
        {"rollout_nll": UNIFORM, "train_nll": None},
        {"rollout_nll": UNIFORM - 0.1, "train_nll": UNIFORM - 0.2},
    ],
)
def test_what_truncated_importance_sampling_corrects_passes(values: dict[str, float | None]) -> None:
    assert judged(values) is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"kl": 0.51}, "KL between rollout and trainer is 0.51 nats a token (bound 0.5)"),
        ({"kl": -0.51}, "KL between rollout and trainer is -0.51"),
        ({"kl": math.inf}, "KL between rollout and trainer is inf"),
        ({"weight_mean": 1.51}, "importance weights' mean is 1.51 (bound 1 ± 0.5)"),
        ({"weight_mean": 0.49}, "importance weights' mean is 0.49"),
        ({"prob_correlation": 0.89, "prob_diff": 0.051}, "correlate by 0.89 only (bound 0.9) and differ by 0.05"),
        ({"prob_correlation": -0.2, "prob_diff": 0.4}, "correlate by -0.20 only"),
        ({"rollout_nll": UNIFORM + 0.04, "train_nll": 0.4}, "samples uniformly: mean log-prob -5.60 = -ln(259)"),
        ({"rollout_nll": UNIFORM - 0.04, "train_nll": UNIFORM + 0.1, "kl": None}, "samples uniformly"),
        # an engine left on its dummy weights: the plainest reason is reason
        ({"kl": 3.7, "weight_mean": 0.08, "rollout_nll": UNIFORM, "train_nll": 9.3}, "samples uniformly"),
        ({"kl": 3.7, "weight_mean": 0.08}, "KL between rollout and trainer is 3.7"),
    ],
)
def test_what_nothing_corrects_is_reason(values: dict[str, float | None], reason: str) -> None:
    assert reason in str(judged(values))


def test_uniform_sampling_is_not_judged_without_the_vocabulary() -> None:
    assert judged({"rollout_nll": UNIFORM, "train_nll": 0.4}, vocabulary=None) is None


def aged(kls: dict[Any, float], tokens: int = 1000, **values: float) -> StepMetrics:
    """A step of an asynchronous run with these KLs by staleness, and `values` over all of its tokens."""
    step = read_step(1, by_staleness(kls, tokens))
    return dataclasses.replace(step, values={**step.values, **HEALTHY, **values})


BROKEN = 3.7
"""KL of an engine with its dummy weights."""


@pytest.mark.parametrize(
    ("kls", "found"),
    [
        ({0: 0.002, 1: 0.02}, None),
        ({0: 0.002, 1: BROKEN}, None),
        ({0: 0.002, "fresh": BROKEN}, None),
        ({1: BROKEN, "fresh": 0.002}, None),
        ({0: BROKEN, 1: 0.002}, "KL between rollout and trainer of tokens without staleness is 3.7"),
        ({1: 0.002, "fresh": BROKEN}, "KL between rollout and trainer of tokens without staleness is 3.7"),
        ({1: BROKEN, 2: 0.002}, "KL between rollout and trainer of tokens of staleness 1 is 3.7"),
        ({1: 0.02, 2: BROKEN}, None),
    ],
)
def test_the_engine_is_judged_by_tokens_without_staleness(kls: dict[int | str, float], found: str | None) -> None:
    """So that staleness neither excuses a broken refit nor passes for one, whatever the step's own figures are."""
    for own in (0.002, BROKEN):
        told = supervise.broken_rollout(aged(kls, kl=own), BOUNDS, VOCABULARY)
        assert told is None if found is None else told is not None and told.startswith(found)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"weight_mean": 0.3}, "the importance weights' mean of tokens without staleness is 0.3"),
        ({"prob_correlation": 0.1, "prob_diff": 0.3}, "probabilities of tokens without staleness correlate by 0.10"),
    ],
)
def test_every_bound_is_one_of_tokens_without_staleness(values: dict[str, float], found: str) -> None:
    step = read_step(1, {**by_staleness({1: 0.02}), **by_staleness({0: 0.002}, **values)})
    assert str(supervise.broken_rollout(step, BOUNDS, VOCABULARY)).startswith(found)
    step = read_step(1, {**by_staleness({0: 0.002}), **by_staleness({1: 0.02}, **values)})
    assert supervise.broken_rollout(step, BOUNDS, VOCABULARY) is None


def test_uniform_samples_are_no_staleness() -> None:
    step = aged({0: 0.002, 1: 0.02}, rollout_nll=UNIFORM, train_nll=2.0)
    assert "samples uniformly" in str(supervise.broken_rollout(step, BOUNDS, VOCABULARY))


def test_too_few_tokens_are_no_judge() -> None:
    step = read_step(1, {**by_staleness({0: BROKEN}, tokens=9), **by_staleness({1: 0.002})})
    assert supervise.broken_rollout(step, BOUNDS, VOCABULARY) is None
    step = read_step(1, {**by_staleness({0: 0.002}, tokens=9), **by_staleness({1: BROKEN})})
    assert "of tokens of staleness 1" in str(supervise.broken_rollout(step, BOUNDS, VOCABULARY))
    step = read_step(1, by_staleness({0: BROKEN}, tokens=9))
    assert supervise.broken_rollout(step, BOUNDS, VOCABULARY) is not None, "the least stale ones are all that there is"
    step = read_step(1, {**by_staleness({0: BROKEN}, tokens=9), **by_staleness({1: 0.002, "fresh": 0.002})})
    assert supervise.broken_rollout(step, BOUNDS, VOCABULARY) is None


def test_staleness_beyond_the_bounds_is_warned_of_once(tiny_plan: Plan, seen: Any) -> None:
    plan = tiny_plan()
    write_handshake(plan.attempt_paths.plugins, handshake())
    watch = watching(plan, seen)
    for number, kls in enumerate(({0: 0.002, 1: 0.3}, {0: 0.002, 1: 0.9}, {0: 0.002, 1: 1.2}), 1):
        add(plan.attempt_paths.metrics, json.dumps({"step": number, "data": by_staleness(kls)}))
    watch.look()
    assert seen.steps == [1, 2, 3]
    (told,) = seen.warnings
    assert told == (
        "step 2: tokens of staleness 1 have a KL of 0.9 nats a token to the trainer, those without staleness 0.002: "
        "lower trainer.prefetch or trainer.max_staleness"
    )


def test_bounds_are_the_specs() -> None:
    step = StepMetrics(step=1, values=HEALTHY | {"kl": 3.7, "weight_mean": 0.08}, seconds={}, accuracy=None, lost=())
    assert supervise.broken_rollout(step, WatchSpec(max_kl=4, max_weight_deviation=0.95), None) is None


LOST: list[tuple[CorrectionSpec, dict[str, float], str, str]] = [
    (
        CorrectionSpec(kind="seq-tis", cap=2.0),
        {"weight_mean": 0.37, "kl_k3": 0.025},
        "the weights of responses vanish at a KL of 0.025 nats a token: their mean is 0.37 instead of 1",
        "--set correction.kind=tis: the mean of token weights does not fall",
    ),
    (
        CorrectionSpec(kind="icepop", cap=5.0, lower=0.5),
        {"weight_mean": 0.2},
        "icepop zeroes most tokens: their mean weight is 0.2",
        "--set correction.kind=tis",
    ),
    (
        CorrectionSpec(reject=RejectSpec(by="token", upper=1.1)),
        {"rejected": 0.95},
        "correction.reject leaves out 95% of the tokens (bound 90%)",
        "--set correction.reject=null",
    ),
]


@pytest.mark.parametrize(("correction", "values", "what", "hint"), LOST)
def test_a_correction_that_leaves_hardly_anything_is_said_so(correction, values, what, hint):
    """It is the correction's bounds, not the engine, that is at fault."""
    step = StepMetrics(step=1, values=values, seconds={}, accuracy=None, lost=())
    assert supervise.broken_rollout(step, BOUNDS, None, correction.kind) is None
    found = supervise.lost_to_correction(step, correction, BOUNDS)
    assert found is not None
    assert what in found[0]
    assert hint in found[1]
    name, value = next(iter(values.items()))
    enough = dataclasses.replace(step, values={**values, name: 0.6 if name == "weight_mean" else value - 0.1})
    assert supervise.lost_to_correction(enough, correction, BOUNDS) is None


def test_truncated_weights_of_tokens_are_judged_with_the_engine():
    step = StepMetrics(step=1, values={"weight_mean": 0.3}, seconds={}, accuracy=None, lost=())
    assert supervise.lost_to_correction(step, CorrectionSpec(kind="tis", cap=2.0), BOUNDS) is None
    assert supervise.broken_rollout(step, BOUNDS, None, "tis") is not None

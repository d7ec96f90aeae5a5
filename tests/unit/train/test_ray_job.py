"""A run as a Ray job: where it is executed, what is submitted, how it is followed and ended.

A job server in memory takes the place of Ray's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrl_cli import contract
from flashrl_cli.config import presets
from flashrl_cli.contract import HANDSHAKE_MARK, read_handshakes
from flashrl_cli.errors import EnvironmentNotReady, InputError, RunFailed
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.plugins import log_ratios
from flashrl_cli.runs import store
from flashrl_cli.runs.metrics import read_metrics
from flashrl_cli.runs.store import Attempt, RunRecord
from flashrl_cli.train import preflight
from flashrl_cli.train.executors import Place, chosen, ray_job, ray_ready, start_here
from flashrl_cli.train.executors.ray_job import (
    UNFOLDED,
    LogExtraction,
    RayJob,
    job_request,
    submission,
    submission_id,
    submission_script,
    submit,
)
from flashrl_cli.train.plan import LaunchPlan, plan_script
from flashrl_cli.train.process import Handle
from flashrl_cli.verl.environment import on_cluster
from tests.specs import load_spec
from tests.unit.train.builders import Clock, FakeJobs, handshake, plan_of

ADDRESS = "http://head:8265"


SHAKE = handshake()
NASTY = [
    *("plain", "a b", "it's", '"$HOME"', "`id`", "$(id)", "a;b&c|d", "\\", "a\nb"),
    *("*", "é→", "!x", "", "-n", "#no", "~"),
]
Plan = Callable[..., LaunchPlan]


# where a run is executed


@pytest.mark.parametrize(
    ("name", "option", "variable", "address"),
    [
        ("local", None, None, None),
        ("local", None, "10.0.0.1:6379", None),
        ("ray", None, None, "http://127.0.0.1:8265"),
        ("ray", None, "http://head:1", "http://head:1"),
        ("ray", "http://other:2", "http://head:1", "http://other:2"),
    ],
)
def test_addresses(
    name: str, option: str | None, variable: str | None, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable or "")
    assert chosen(name, option) == Place(address)


@pytest.mark.parametrize(
    ("name", "address", "message"),
    [
        ("slurm", None, "--executor slurm"),
        ("", None, "no such executor"),
        ("local", "http://h:1", "--ray-address without"),
    ],
)
def test_an_executor_that_there_is_not(name: str, address: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        chosen(name, address)
    assert "--executor" in str(caught.value.hint)


def test_this_machine_takes_a_preset_as_it_is(tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    found, plan = load_spec("tiny"), tiny_plan()
    assert Place().fit(found) is found
    assert (Place().submission_script(plan), Place().document(plan)) == ([], {})
    checked: list[Any] = []
    monkeypatch.setattr(preflight, "check", checked.append)
    assert Place().ready(plan, pytest.fail) is start_here
    assert checked == [plan]


def test_a_cluster_is_given_a_job(tiny_plan: Plan) -> None:
    place = Place("http://h:1")
    assert not [key for key in place.fit(load_spec("tiny")).spec.verl if "ray_init" in key]
    job = place.document(tiny_plan())["ray"]
    assert set(job) == {"address", "submission_id", "entrypoint", "runtime_env", "metadata"}
    assert place.gpu_memory(tiny_plan().spec) == []


def test_the_record_names_the_job(tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, jobs = tiny_plan(), FakeJobs()
    said: list[str] = []
    plan.attempt_paths.plugins.mkdir(parents=True)
    first = Attempt(number=1, status="running", started="t", updated="t")
    whole = RunRecord(name="r", project="tiny", preset="tiny", created="t", checkpoints="c", attempts=(first,))
    store.change(plan.paths, lambda _: whole)
    monkeypatch.setattr(ray_job, "connect", lambda _: jobs)
    monkeypatch.setattr(ray_ready, "check", lambda *_: ray_ready.Readiness(shared=False, nodes=2))
    monkeypatch.setattr(preflight, "check", lambda *_: pytest.fail("this machine need not be able to"))
    judged: list[LaunchPlan] = []
    monkeypatch.setattr(preflight, "check_rows", judged.append)
    handle = Place("http://h:1").ready(plan, said.append)(plan)
    assert judged == [plan]
    assert isinstance(handle, ray_job.RayJob)
    handle.kill()
    found = store.load(plan.paths.record)
    assert found
    assert found.last
    assert (found.last.executor, found.last.ray_address, found.last.job_id) == ("ray", "http://h:1", handle.id)
    assert said[-1] == "2 nodes; metrics and proof come from the job log"


# what is submitted


def shared_plan(preset: str, *sets: str) -> LaunchPlan:
    """A plan for a cluster."""
    return plan_of(on_cluster(load_spec(preset, sets=sets)), Path("/shared"), attempt=2, python="/venv/bin/python")


def test_the_job_of_the_cpu_preset() -> None:
    plan = shared_plan("tiny", "resources.nodes=2")
    job = job_request(plan, "http://head:8265")
    assert job.address == "http://head:8265"
    assert job.command == plan.argv
    assert {**plan.env, "RAY_DEDUP_LOGS_ALLOW_REGEX": UNFOLDED} == job.runtime_env["env_vars"]
    assert set(job.runtime_env) == {"env_vars"}
    assert not [word for word in job.command if "num_gpus" in word or "num_cpus" in word]
    assert "trainer.nnodes=2" in job.command


@pytest.mark.parametrize("preset", [name for name in presets.names() if name != "base"])
def test_every_preset_becomes_a_job(preset: str) -> None:
    plan = shared_plan(preset)
    submitted = submission(job_request(plan, "http://head:8265"))
    json.dumps(submitted)
    assert submitted["entrypoint"].startswith("exec /venv/bin/python -m verl.trainer.main_ppo ")
    assert submitted["runtime_env"]["env_vars"]["FLASHRL_PLUGIN_DIR"] == "/shared/runs/r/attempt_2/plugins"


def test_what_verl_hands_on_itself_is_the_drivers_alone() -> None:
    sets = ["env.NCCL_ALGO=Ring", "env.MINE=1", "verl.+ray_kwargs.ray_init.runtime_env.env_vars.HERS=2", "env.HERS=3"]
    job = job_request(shared_plan("dapo-32b", *sets), "http://head:8265")
    assert job.runtime_env["env_vars"].keys() & {"NCCL_ALGO", "MINE", "HERS"} == {"MINE"}
    assert job.command[:4] == ("env", "HERS=3", "NCCL_ALGO=Ring", "/venv/bin/python")


def test_without_a_shared_folder_workers_print_their_handshakes(tiny_plan: Plan) -> None:
    plan = tiny_plan()
    env = job_request(plan, "http://head:8265", shared=False).runtime_env["env_vars"]
    assert env["FLASHRL_TELL"] == "1"
    assert "VERL_FILE_LOGGER_PATH" not in env
    assert env["VERL_FILE_LOGGER_ROOT"] == str(plan.attempt_paths.root / "node")


def test_ray_folds_neither_steps_nor_handshakes_into_one(tiny_plan: Plan) -> None:
    env = job_request(tiny_plan("env.RAY_DEDUP_LOGS_ALLOW_REGEX=mine|ours"), "http://h").runtime_env["env_vars"]
    allowed = re.compile(env["RAY_DEDUP_LOGS_ALLOW_REGEX"])
    for line in ("step:3 - a:1", 'x FLASHRL_HANDSHAKE {"pid": 1}', "mine", "ours"):
        assert allowed.search(line)
    assert not allowed.search("loading")


def test_a_jobs_name_is_the_runs_and_fits_into_a_url_and_a_file() -> None:
    plan = shared_plan("tiny")
    assert re.fullmatch(r"r-2-[0-9a-f]{8}", submission_id(plan))
    assert submission_id(plan) == submission_id(shared_plan("dapo-32b"))
    odd = submission_id(dataclasses.replace(plan, name="my run: é/#?"))
    assert re.fullmatch(r"my-run-------2-[0-9a-f]{8}", odd)


@pytest.mark.processes
@pytest.mark.parametrize("nasty", NASTY)
def test_a_shell_reads_the_entry_point_back(nasty: str, tiny_plan: Plan, tmp_path: Path) -> None:
    printer = tmp_path / "print it"
    printer.write_text('#!/bin/sh\nprintf "%s\\0" "$NCCL_ALGO" "$@"\n')
    printer.chmod(0o755)
    plan = tiny_plan(f"env.NCCL_ALGO={nasty!r}" if nasty.strip() else "env.NCCL_ALGO=''")
    plan = dataclasses.replace(plan, env={**plan.env, "NCCL_ALGO": nasty}, argv=(str(printer), nasty, *plan.argv[2:]))
    entry = submission(job_request(plan, "http://h"))["entrypoint"]
    out = subprocess.run(["sh", "-c", entry], capture_output=True, text=True, check=True).stdout
    assert out.split("\0")[:-1] == [nasty, *plan.argv[1:]]


@pytest.mark.processes
@pytest.mark.parametrize("weird", ["plain", "it's", "a b\nc", "$HOME `x`"])
def test_the_script_submits_the_same_job(weird: str, tmp_path: Path) -> None:
    """A `ray` that prints its arguments is in place of Ray's."""
    ray = tmp_path / "bin/ray"
    ray.parent.mkdir()
    ray.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    ray.chmod(0o755)
    plan = plan_of(
        on_cluster(load_spec("tiny", sets=["env.NCCL_ALGO=Ring"])),
        tmp_path / weird,
        name=weird,
        python="/venv/bin/python",
    )
    job = job_request(plan, "http://head:8265")
    env = {**os.environ, "PATH": f"{ray.parent}:{os.environ['PATH']}"}
    script = plan_script(plan, ["fits"], submission=submission_script(plan, job))
    out = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env=env).stdout
    words = out.split("\0")[:-1]
    options = dict(zip(words[3:11:2], words[4:11:2], strict=True))
    assert words[:3] == ["job", "submit", "--no-wait"]
    assert options["--submission-id"] == job.submission_id
    assert json.loads(options["--runtime-env-json"]) == job.runtime_env
    assert json.loads(options["--metadata-json"]) == job.metadata
    assert words[11:18] == ["--", "exec", *job.command[:5]]
    assert sorted(words[18:]) == sorted(job.command[5:])
    assert "export " not in script


# what comes out of the log


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptPaths:
    return AttemptPaths(tmp_path)


def log(attempt: AttemptPaths, text: str) -> None:
    with attempt.log.open("a", encoding="utf-8") as stream:
        stream.write(text)


def printed(one: contract.Handshake) -> str:
    return HANDSHAKE_MARK + json.dumps(dataclasses.asdict(one))


def test_steps_appear_in_the_metrics_file(attempt: AttemptPaths) -> None:
    extraction = LogExtraction(attempt)
    extraction.poll()
    assert not attempt.metrics.exists()
    log(
        attempt,
        "\x1b[36m(T pid=1)\x1b[0m step:1 - critic/score/mean:0.5 - actor/grad_norm:nan\nnoise\nstep:2 - critic/sc",
    )
    extraction.poll()
    log(attempt, "ore/mean:0.75")
    extraction.poll()
    assert [step.step for step in read_metrics(attempt.metrics)] == [1]
    extraction.poll(ended=True)
    first, second = read_metrics(attempt.metrics)
    assert (first["reward"], first.lost, second["reward"]) == (0.5, ("grad_norm",), 0.75)


def test_a_line_that_two_nodes_send_is_one_step(attempt: AttemptPaths) -> None:
    one = "step:{} - critic/score/mean:0.5\n"
    log(attempt, "(T pid=1, ip=127.0.0.3) " + one.format(1) + one.format(1) + one.format(2) + one.format(2))
    LogExtraction(attempt).poll()
    assert [step.step for step in read_metrics(attempt.metrics)] == [1, 2]


def test_handshakes_appear_in_the_plugins_folder(attempt: AttemptPaths) -> None:
    extraction = LogExtraction(attempt)
    for damaged in ("{", "[]", "7", '{"schema_version": 2}', '{"schema_version": 1}', ""):
        log(attempt, f"{HANDSHAKE_MARK}{damaged}\n")
    extraction.poll()
    assert list(read_handshakes(attempt.plugins)) == []
    log(attempt, f"\x1b[36m(vLLMHttpServer pid=3, ip=127.0.0.3)\x1b[0m (Worker pid=8) {printed(SHAKE)}\n")
    extraction.poll()
    assert list(read_handshakes(attempt.plugins)) == [SHAKE]
    log(attempt, f"{printed(handshake(refits=2))}\n{printed(handshake(pid=9))}\n")
    extraction.poll()
    assert [(one.pid, one.refits) for one in read_handshakes(attempt.plugins)] == [(1, 2), (9, 1)]


def test_kept_log_ratios_appear_in_their_folder(attempt: AttemptPaths) -> None:
    sample = log_ratios.Sample(
        step=3,
        responses=8,
        log_ratios=np.linspace(-1, 1, 12).astype(np.float16),
        lengths=np.array([4, 8], np.int32),
        advantages=np.ones(2, np.float32),
    )
    (line,) = log_ratios.printed(sample)
    assert re.search(UNFOLDED, line), "Ray must not take two parts for the same line"
    log(attempt, f"\x1b[36m(TaskRunner pid=3, ip=127.0.0.3)\x1b[0m {line}\n")
    LogExtraction(attempt).poll()
    found = log_ratios.read(log_ratios.file_of(attempt.log_ratios, 3))
    assert np.array_equal(found.log_ratios, sample.log_ratios)
    assert not attempt.metrics.exists()


def test_workers_print_handshakes_where_they_are_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contract.write_handshake(tmp_path, SHAKE)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(contract.ENV_PRINT, "1")
    contract.write_handshake(tmp_path, SHAKE)
    assert contract.printed_handshake(capsys.readouterr().out) == SHAKE


# the job under way


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ray_job, "time", clock)
    return clock


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJobs]:
    monkeypatch.setattr(ray_job, "LOG_PAUSES_S", (0.01,))
    monkeypatch.setattr(ray_job, "LOG_PATIENCE_S", 2.0)
    fake = FakeJobs()
    yield fake
    fake.failing = None
    fake.hangs.clear()
    for job in fake.jobs.values():  # lets the followers end
        job.status = "STOPPED"


@pytest.fixture
def plan(tiny_plan: Callable[..., LaunchPlan]) -> LaunchPlan:
    plan = tiny_plan()
    plan.attempt_paths.plugins.mkdir(parents=True)
    return plan


def start(jobs: FakeJobs, plan: LaunchPlan, *, shared: bool = True) -> RayJob:
    return submit(jobs, plan, ADDRESS, shared=shared)


def end(jobs: FakeJobs, handle: RayJob, status: str, code: int | None, message: str = "") -> None:
    job = jobs.jobs[handle.id]
    job.status, job.driver_exit_code, job.message = status, code, message


def eventually(check: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def written(plan: LaunchPlan) -> str:
    return plan.attempt_paths.log.read_text(encoding="utf-8") if plan.attempt_paths.log.exists() else ""


def test_it_is_a_handle_and_submits_the_plan(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    handle: Handle = start(jobs, plan)
    (job,) = jobs.jobs.values()
    assert job.submitted == submission(job_request(plan, ADDRESS))
    assert handle.poll() is None


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", None, 1),
        ("STOPPED", None, -signal.SIGTERM),
        ("SUCCEEDED", None, 0),
    ],
)
def test_exit_codes(jobs: FakeJobs, plan: LaunchPlan, clock: Clock, status: str, driver: int | None, code: int) -> None:
    handle = start(jobs, plan)
    end(jobs, handle, status, driver)
    assert handle.poll() == code
    assert handle.poll() == code


def test_ray_is_asked_every_one_and_a_half_seconds(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    handle = start(jobs, plan)
    for _ in range(60):
        handle.poll()
        clock.sleep(0.2)
    assert 7 <= jobs.asked <= 9


def test_the_log_appears_here_whole_before_the_exit_code(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    handle = start(jobs, plan)
    jobs.log[handle.id] = "first é line\nsecond"
    eventually(lambda: "second" in written(plan))
    jobs.log[handle.id] += " line\nlast"
    end(jobs, handle, "SUCCEEDED", 0)
    assert handle.poll() == 0
    assert written(plan) == "first é line\nsecond line\nlast"
    assert jobs.opened == 1


def test_a_broken_connection_brings_nothing_twice(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    jobs.breaks = 4
    handle = start(jobs, plan)
    text = "".join(f"line {n} → €\n" for n in range(50))
    jobs.log[handle.id] = text
    eventually(lambda: written(plan) == text)
    assert jobs.opened == 5
    jobs.log[handle.id] += "end\n"
    end(jobs, handle, "SUCCEEDED", 0)
    handle.poll()
    assert written(plan) == text + "end\n"


def test_a_stream_that_does_not_end_is_not_waited_for(
    jobs: FakeJobs, plan: LaunchPlan, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_job, "LOG_PATIENCE_S", 0.05)
    jobs.hangs.set()
    handle = start(jobs, plan)
    jobs.log[handle.id] = "all of it\n"
    end(jobs, handle, "SUCCEEDED", 0)
    assert handle.poll() == 0
    assert written(plan) == "all of it\n"


def test_silence_makes_a_new_connection(
    jobs: FakeJobs, plan: LaunchPlan, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_job, "SILENCE_S", 0.05)
    handle = start(jobs, plan)
    jobs.log[handle.id] = "a\n"
    eventually(lambda: jobs.opened >= 3)
    assert written(plan) == "a\n"


def test_a_silent_job_server_is_asked_ever_less_and_given_up(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    handle = start(jobs, plan)
    handle.poll()
    asked = jobs.asked
    jobs.failing = ConnectionError("no route to host")

    def wait() -> None:
        for _ in range(1000):
            handle.poll()
            clock.sleep(0.2)

    with pytest.raises(RunFailed, match=r"has not answered for 1[23]\d s: no route to host") as caught:
        wait()
    assert "--resume auto" in str(caught.value.hint)
    assert jobs.asked - asked < 15


def test_a_pause_of_the_job_server_is_survived(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    handle = start(jobs, plan)
    for broken in (True, False, True, False):
        jobs.failing = RuntimeError("Request failed with status code 500") if broken else None
        for _ in range(400):
            assert handle.poll() is None
            clock.sleep(0.2)
    end(jobs, handle, "SUCCEEDED", 0)
    clock.sleep(30)
    assert handle.poll() == 0


def test_kill_stops_the_job_and_waits(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    handle = start(jobs, plan)
    handle.terminate()
    handle.kill(grace_s=3)
    assert set(jobs.stopped) == {handle.id}
    assert handle.poll() == -signal.SIGTERM


def test_a_job_that_does_not_stop_is_reported(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    jobs.ends_when_stopped = False
    handle = start(jobs, plan)
    with pytest.raises(RunFailed, match="does not end") as caught:
        handle.kill()
    assert f"ray job stop {handle.id}" in str(caught.value.hint)


def test_a_job_without_a_driver_leaves_rays_reason_in_the_log(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    handle = start(jobs, plan)
    end(jobs, handle, "FAILED", None, "The job supervisor actor died because its node has died.")
    assert handle.poll() == 1
    assert written(plan).endswith("Ray: The job supervisor actor died because its node has died.\n")


def test_metrics_and_proof_come_out_of_the_log_where_no_folder_is_shared(
    jobs: FakeJobs, plan: LaunchPlan, clock: Clock
) -> None:
    handle = start(jobs, plan, shared=False)
    (job,) = jobs.jobs.values()
    assert job.submitted["runtime_env"]["env_vars"]["FLASHRL_TELL"] == "1"
    jobs.log[handle.id] = f"{printed(SHAKE)}\nstep:1 - critic/score/mean:0.5\n"
    eventually(lambda: "step:1" in written(plan))
    handle.tend()
    assert list(read_handshakes(plan.attempt_paths.plugins)) == [SHAKE]
    jobs.log[handle.id] += "step:2 - critic/score/mean:0.75"
    end(jobs, handle, "SUCCEEDED", 0)
    clock.sleep(2)
    assert handle.poll() == 0
    assert [step["reward"] for step in read_metrics(plan.attempt_paths.metrics)] == [0.5, 0.75]


def test_a_shared_folder_is_left_to_verl(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    handle = start(jobs, plan)
    jobs.log[handle.id] = "step:1 - critic/score/mean:0.5\n"
    end(jobs, handle, "SUCCEEDED", 0)
    handle.tend()
    handle.poll()
    assert not plan.attempt_paths.metrics.exists()


def test_the_name_of_a_removed_run_is_not_free_on_the_cluster(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    name = submission_id(plan)
    jobs.add(name, "SUCCEEDED")
    jobs.add(f"{name}-2", "FAILED")
    assert start(jobs, plan).id == f"{name}-3"


@pytest.mark.parametrize(
    "error", [RuntimeError("bad runtime_env"), ConnectionError("gone"), ValueError("no such field")]
)
def test_a_job_that_ray_does_not_take(jobs: FakeJobs, plan: LaunchPlan, error: Any) -> None:
    jobs.failing = error
    with pytest.raises(EnvironmentNotReady, match=f"does not take the job: {error}"):
        start(jobs, plan)


def two_nodes(jobs: FakeJobs, *, used: bool = True) -> dict[str, Any]:
    """A cluster of two nodes, the second of which is returned; the job has actors there if `used`."""
    first: dict[str, Any] = {"node_id": "n1", "node_ip": "10.0.0.1", "state": "ALIVE"}
    second = first | {"node_id": "n2", "node_ip": "10.0.0.2"}
    jobs.rows["nodes"] = [first, second]
    jobs.rows["actors"] = [{"job_id": "0a000000" if used else "01000000", "node_id": "n2"}]
    return second


def follow(handle: RayJob, clock: Clock, seconds: float) -> int | None:
    for _ in range(int(seconds / 0.2)):
        if (code := handle.poll()) is not None:
            return code
        handle.tend()
        clock.sleep(0.2)
    return None


def test_a_lost_node_ends_the_run_once(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    node, handle = two_nodes(jobs), start(jobs, plan)
    follow(handle, clock, 10)
    node |= {"state": "DEAD", "state_message": "health check failed"}
    with pytest.raises(RunFailed, match=r"lost node 10\.0\.0\.2, .*: health check failed") as caught:
        follow(handle, clock, 10)
    assert "--resume auto" in str(caught.value.hint)
    handle.tend()
    handle.kill()
    assert handle.poll() == -signal.SIGTERM


@pytest.mark.parametrize("kind", ["without the job's workers", "dead before", "state API fails"])
def test_other_nodes_may_die(jobs: FakeJobs, plan: LaunchPlan, clock: Clock, kind: str) -> None:
    node, handle = two_nodes(jobs, used=kind != "without the job's workers"), start(jobs, plan)
    if kind != "dead before":
        follow(handle, clock, 10)
    if kind == "state API fails":
        del jobs.rows["nodes"]
    node["state"] = "DEAD"
    assert follow(handle, clock, 20) is None


def test_a_node_that_ray_declares_dead_after_the_job_failed(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    node, handle = two_nodes(jobs), start(jobs, plan)
    follow(handle, clock, 10)
    jobs.log[handle.id] = "RuntimeError: [gloo] Connection closed by peer\n"
    end(jobs, handle, "FAILED", 1)
    clock.after(15, lambda: node.update(state="DEAD"))
    with pytest.raises(RunFailed, match=r"lost node 10\.0\.0\.2"):
        follow(handle, clock, 10)
    assert handle.poll() == 1


@pytest.mark.parametrize(("log", "waited"), [("ValueError: bad key\n", False), ("ActorDiedError\n", True)])
def test_other_failures_are_not_waited_with(
    jobs: FakeJobs, plan: LaunchPlan, clock: Clock, log: str, waited: bool
) -> None:
    two_nodes(jobs)
    handle = start(jobs, plan)
    follow(handle, clock, 10)
    jobs.log[handle.id] = log
    end(jobs, handle, "FAILED", 1)
    before = clock.now
    assert follow(handle, clock, 10) == 1
    assert (clock.now - before > 20) is waited


def test_a_cluster_of_one_node_is_not_waited_for(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
    two_nodes(jobs)
    jobs.rows["nodes"].pop()
    handle = start(jobs, plan)
    follow(handle, clock, 10)
    jobs.log[handle.id] = "ActorDiedError\n"
    end(jobs, handle, "FAILED", 1)
    before = clock.now
    assert follow(handle, clock, 10) == 1
    assert clock.now - before < 3

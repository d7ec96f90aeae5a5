"""A Ray job is submitted, followed and ended; a job server in memory stands in for Ray's."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flashrl_cli.contract import read_handshakes
from flashrl_cli.errors import EnvironmentNotReady, RunFailed
from flashrl_cli.runs.metrics import read_metrics
from flashrl_cli.train import plan as ray_plan
from flashrl_cli.train.executors import ray_job
from flashrl_cli.train.executors import ray_job as ray_log
from flashrl_cli.train.executors import ray_job as ray_lost
from flashrl_cli.train.executors.ray_job import RayJob, starter
from flashrl_cli.train.plan import LaunchPlan
from flashrl_cli.train.process import Handle
from tests.unit.test_contract import SHAKE
from tests.unit.train.fake_jobs import FakeJobs
from tests.unit.train.test_relay import told

ADDRESS = "http://head:8265"


class Clock:
    """Time that passes only when the code under test sleeps, or the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._later: list[tuple[float, Callable[[], object]]] = []

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        self._later.append((self.now + seconds, act))

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due, act in self._later:
            if due <= self.now:
                act()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ray_job, "time", clock)
    monkeypatch.setattr(ray_lost, "time", clock)
    return clock


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJobs]:
    monkeypatch.setattr(ray_log, "LOG_PAUSES_S", (0.01,))
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
    return starter(jobs, ADDRESS, shared=shared)(plan)


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
    assert job.submitted == ray_plan.submission(ray_plan.job_request(plan, ADDRESS))
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
    monkeypatch.setattr(ray_log, "SILENCE_S", 0.05)
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


def test_a_job_that_does_not_stop_is_told(jobs: FakeJobs, plan: LaunchPlan, clock: Clock) -> None:
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
    jobs.log[handle.id] = f"{told(SHAKE)}\nstep:1 - critic/score/mean:0.5\n"
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
    name = ray_plan.submission_id(plan)
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

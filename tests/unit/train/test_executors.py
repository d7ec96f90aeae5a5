"""Where a run is executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.errors import InputError
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt, RunRecord
from flashrl_cli.train import executors, preflight
from flashrl_cli.train.executors import Place, chosen, ray_job, ray_ready
from flashrl_cli.train.executors import ray_job as ray_client
from flashrl_cli.train.plan import LaunchPlan
from flashrl_cli.train.supervise import locally
from tests.unit.train.fake_jobs import FakeJobs

Plan = Callable[..., LaunchPlan]


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


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
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert chosen(name, option) == Place(address)


@pytest.mark.parametrize(
    ("name", "address", "told"),
    [
        ("slurm", None, "--executor slurm"),
        ("", None, "no such executor"),
        ("local", "http://h:1", "--ray-address without"),
    ],
)
def test_misuse(name: str, address: str | None, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        chosen(name, address)
    assert "--executor" in str(caught.value.hint)


def test_this_machine_takes_a_preset_as_it_is(tiny_plan: Plan) -> None:
    found, plan = load_spec("tiny"), tiny_plan()
    assert Place().fit(found) is found
    assert (Place().job(plan), Place().document(plan)) == (None, {})


def test_a_cluster_is_given_a_job(tiny_plan: Plan) -> None:
    place = Place("http://h:1")
    assert not [key for key in place.fit(load_spec("tiny")).spec.verl if "ray_init" in key]
    told = place.document(tiny_plan())["ray"]
    assert set(told) == {"address", "submission_id", "entrypoint", "runtime_env", "metadata"}
    assert place.gpu_memory(tiny_plan()) == []


def test_a_local_run_is_started_as_ever(tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(preflight, "check", lambda *found: checked.append(found))
    plan = tiny_plan()
    assert Place().ready(plan, tmp_path, pytest.fail) is locally
    assert checked == [(plan, tmp_path)]


def test_the_record_names_the_job(tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan, jobs = tiny_plan(), FakeJobs()
    said: list[str] = []
    plan.attempt_paths.plugins.mkdir(parents=True)
    first = Attempt(number=1, status="running", started="t", updated="t")
    whole = RunRecord(name="r", project="tiny", preset="tiny", created="t", checkpoints="c", attempts=(first,))
    store.change(plan.paths, lambda _: whole)
    monkeypatch.setattr(ray_client, "connect", lambda _: jobs)
    monkeypatch.setattr(ray_ready, "check", lambda *_: ray_ready.Readiness(shared=False, nodes=2))
    monkeypatch.setattr(preflight, "check", lambda *_: pytest.fail("this machine need not be able to"))
    handle = executors.Place("http://h:1").ready(plan, tmp_path, said.append)(plan)
    assert isinstance(handle, ray_job.RayJob)
    handle.kill()
    found = store.load(plan.paths.record)
    assert found
    assert found.last
    assert (found.last.executor, found.last.ray_address, found.last.job_id) == ("ray", "http://h:1", handle.id)
    assert said[-1] == "2 nodes; metrics and proof come from the job log"

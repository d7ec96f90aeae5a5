"""What flashrl knows of Ray's job client and of how verl joins a cluster, held against both."""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from flashrl_cli.config import presets
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.train import launch
from flashrl_cli.train.executors import ray_job as ray_client
from flashrl_cli.train.executors.ray_job import job_request
from flashrl_cli.train.plan import LaunchPlan, build_plan
from flashrl_cli.verl import environment
from tests.specs import load_spec

TOKEN = "a-token-of-more-than-thirty-two-characters"


def verl_source(file: str) -> str:
    spec = find_spec("verl")
    assert spec
    assert spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")


def plan(preset: str, root: Path) -> LaunchPlan:
    resolved = environment.on_cluster(load_spec(preset))
    found = build_plan(
        resolved,
        name="r",
        attempt=1,
        python="/venv/bin/python",
        runs_root=root / "runs",
        checkpoints_root=root / "checkpoints",
        data_root=root / "data",
    )
    launch.judge(resolved, found)
    return found


def test_the_variables_that_verl_hands_on_itself() -> None:
    text = verl_source("trainer/constants_ppo.py")
    loops = re.findall(r"for key in \(([^)]*)\):", text[text.index("def get_ppo_ray_runtime_env") :])
    names = {name for loop in loops for name in re.findall(r'"(\w+)"', loop)}
    names |= set(re.findall(r'setdefault\("env_vars", \{\}\)\["(\w+)"\]', verl_source("trainer/main_ppo.py")))
    assert names == environment.VERL_VARIABLES


@pytest.mark.parametrize("preset", presets.names())
def test_ray_joins_the_jobs_environment_with_verls(preset: str, tmp_path: Path) -> None:
    from ray.runtime_env.runtime_env import RuntimeEnv, _merge_runtime_env

    job = job_request(plan(preset, tmp_path), "http://h")
    RuntimeEnv(**job.runtime_env)
    verls = {"env_vars": dict.fromkeys(environment.VERL_VARIABLES, "0"), "working_dir": None}
    merged = _merge_runtime_env(dict(job.runtime_env), verls)
    assert merged is not None
    assert merged["env_vars"].items() >= job.runtime_env["env_vars"].items()


def test_what_makes_a_ray_of_ones_own_are_arguments_of_ray_init() -> None:
    import ray

    source = inspect.getsource(ray.init)
    assert [name for name in environment.OWN_RAY if f'"{name}"' not in source and f"{name}:" not in source] == []
    refused = set(re.findall(r"if (\w+) is not None:\s+raise ValueError\(\s+\"When connecting", source))
    assert {"resources", "labels", "object_store_memory"} <= refused <= environment.OWN_RAY


def test_cpus_that_verl_takes_with_a_device() -> None:
    pool = r"class ResourcePoolManager.*?max_colocate_count: int = (\d+)"
    found = re.search(pool, verl_source("single_controller/ray/base.py"), re.DOTALL)
    assert found
    assert int(found[1]) == environment.CPUS_A_DEVICE


class Server(ThreadingHTTPServer):
    """Answers as Ray's job server does to the few requests of these tests, and keeps what it was asked."""

    def __init__(self, *, token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        told = self.headers.get("Authorization", "")
        if self.server.token and told.removeprefix("Bearer ") != self.server.token:
            self._answer(401, {})
        elif self.path.startswith("/api/version"):
            self._answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})
        elif self.path.startswith("/api/v0/nodes"):
            asked = parse_qs(urlsplit(self.path).query)
            int(asked["timeout"][0]), int(asked["limit"][0])  # as ray/dashboard/state_api_utils.py:82 reads them
            self._answer(200, {"result": True, "data": {"result": {"total": 1, "result": [{"node_id": "n"}]}}})
        elif self.path.startswith("/api/jobs/slow"):
            threading.Event().wait(2)
        else:
            self._answer(500, {})

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def test_the_given_address_is_asked_and_no_other(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ray_client.OVERRULING:
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    jobs = ray_client.connect(server.url)
    assert jobs.listed("nodes", state="ALIVE", node_id="n") == [{"node_id": "n"}]
    assert "filter_keys=state&filter_keys=node_id" in server.asked[-1]
    with pytest.raises(RuntimeError, match="500"):
        jobs.get_job_info("x")


def test_a_job_server_that_hangs_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_client, "REQUEST_TIMEOUT_S", (1.0, 0.2))
    jobs = ray_client.connect(server.url)
    with pytest.raises(OSError, match="timed out"):
        jobs.get_job_info("slow")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://", "nonsense://x:1"])
def test_nobody_there(address: str) -> None:
    with pytest.raises(EnvironmentNotReady, match=f"no Ray job server answers at {re.escape(address)}") as caught:
        ray_client.connect(address)
    assert "--ray-address" in str(caught.value.hint)


def test_a_cluster_that_asks_for_a_token(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = TOKEN
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-token-of-more-than-thirty-two-characters")
    with pytest.raises(EnvironmentNotReady, match="Authentication") as caught:
        ray_client.connect(server.url)
    assert "RAY_AUTH_TOKEN" in str(caught.value.hint)

"""Run a launch plan as a Ray job through Ray's job server: submit it, follow it, and stop it.

The module follows the order of a run: the job's request, which is pure and printable; its submission; the handle that
supervises it, which follows its log, watches its nodes, and reads metrics and handshakes from the log; and finally
Ray's job client.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from flashrl_cli import contract
from flashrl_cli.errors import EnvironmentNotReady, RunFailed
from flashrl_cli.files import last_lines
from flashrl_cli.plugins import log_ratios, reward
from flashrl_cli.runs.metrics import Tail
from flashrl_cli.verl import environment
from flashrl_cli.verl.logs import plain, read_line

if TYPE_CHECKING:
    from flashrl_cli.paths import AttemptPaths
    from flashrl_cli.train.plan import LaunchPlan

DEDUP = "RAY_DEDUP_LOGS_ALLOW_REGEX"
UNFOLDED = rf"{contract.HANDSHAKE_MARK}|{log_ratios.MARK}|{reward.MARK}|step:\d+ - "
"""Lines that Ray must not deduplicate: it treats lines of two workers as equal if they differ only in numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job for Ray's job server at `address`; `runtime_env` applies to the driver and every actor on every node."""

    address: str
    submission_id: str
    command: tuple[str, ...]
    runtime_env: Mapping[str, Any]
    metadata: Mapping[str, str]


def job_request(plan: LaunchPlan, address: str, *, shared: bool = True) -> Job:
    """The job of a plan; `shared` says that the attempt's folder is the same here and on every node.

    Without a shared folder, workers print their handshakes to the log, and verl's metrics file is created on the node
    that writes it.
    """
    env = dict(plan.env) if shared else environment.without_shared_folder(plan.env, plan.attempt_paths.root)
    if not shared:
        env[contract.ENV_PRINT] = "1"
    if not shared and plan.reward:
        sent = environment.shipped(plan.spec, plan.attempt_paths)
        env[contract.ENV_REWARD] = replace(sent, source=plan.reward.text).text()
    env[DEDUP] = f"(?:{env[DEDUP]})|{UNFOLDED}" if DEDUP in env else UNFOLDED
    alone = environment.driver_only(plan.overrides)
    drivers = [f"{key}={value}" for key, value in env.items() if key in alone]
    return Job(
        address=address,
        submission_id=submission_id(plan),
        command=("env", *drivers, *plan.argv) if drivers else plan.argv,
        runtime_env={"env_vars": {key: value for key, value in sorted(env.items()) if key not in alone}},
        metadata={
            "flashrl_run": plan.name,
            "flashrl_attempt": str(plan.attempt),
            "flashrl_folder": str(plan.paths.root),
        },
    )


def submission_id(plan: LaunchPlan) -> str:
    """Name of the job: run, attempt, and a digest of the attempt's folder, because others may use the same run name."""
    digest = hashlib.sha256(str(plan.attempt_paths.root).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', plan.name)}-{plan.attempt}-{digest}"


def submission(job: Job) -> dict[str, Any]:
    """The job as plain data in the form of `submit_job`, for `--dry-run --json` and for Ray."""
    return {
        "submission_id": job.submission_id,
        "entrypoint": f"exec {shlex.join(job.command)}",
        "runtime_env": dict(job.runtime_env),
        "metadata": dict(job.metadata),
    }


def submission_script(plan: LaunchPlan, job: Job) -> list[str]:
    """The end of a POSIX shell script that submits the job without waiting; the overrides are its arguments `$@`.

    `ray job submit` quotes the words after `--` for the shell that Ray starts them with.
    """
    options = {
        "--address": job.address,
        "--submission-id": job.submission_id,
        "--runtime-env-json": json.dumps(job.runtime_env),
        "--metadata-json": json.dumps(job.metadata),
    }
    start = job.command[: len(job.command) - len(plan.argv) + 3]
    lines = (
        "exec ray job submit --no-wait",
        *(f"{key} {shlex.quote(value)}" for key, value in options.items()),
        f'-- exec {shlex.join(start)} "$@"',
    )
    return [" \\\n  ".join(lines)]


def submit(jobs: Jobs, plan: LaunchPlan, address: str, *, shared: bool) -> RayJob:
    """Submit a plan as a job of `jobs`, under the job's name or the first free variant of it.

    A cluster also remembers the names of runs that were removed. Raises EnvironmentNotReady if Ray refuses the job.
    """
    job = job_request(plan, address, shared=shared)
    try:
        used = {known.submission_id for known in jobs.list_jobs()}
        names = (job.submission_id, *(f"{job.submission_id}-{n}" for n in range(2, len(used) + 2)))
        free = next(name for name in names if name not in used)
        job_id = jobs.submit_job(**submission(job) | {"submission_id": free})
    except (RuntimeError, OSError, ValueError) as error:
        raise EnvironmentNotReady(
            f"Ray does not take the job: {str(error)[:1000]}", hint="`--dry-run` shows what is submitted"
        ) from error
    return RayJob(jobs, plan, job_id, shared=shared)


STATUS_PAUSES_S = (1.5, 3.0, 6.0, 12.0, 20.0)
"""Seconds between two queries of the job's state: the first value while it answers, the others after each failure."""
SERVER_PATIENCE_S = 120.0
"""Seconds that the job server may fail to answer."""
LOG_PATIENCE_S = 15.0
STOP_PATIENCE_S = 60.0
"""Seconds that a job may take to stop: Ray itself kills its driver after 3 s."""
ENDED = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": -signal.SIGTERM}


class RayJob:
    """A `process.Handle` for a Ray job; without a shared folder it reads metrics and handshakes from the log."""

    def __init__(self, jobs: Jobs, plan: LaunchPlan, job_id: str, *, shared: bool) -> None:
        self.id = job_id
        self._jobs, self._log = jobs, plan.attempt_paths.log
        self._extraction = None if shared else LogExtraction(plan.attempt_paths)
        self._follower = LogFollower(jobs, job_id, self._log)
        self._follower.start()
        self._nodes = NodeWatch(jobs)
        self._ray_id: str | None = None
        self._lost = False
        self._code: int | None = None
        self._answered = time.monotonic()
        self._due = 0.0
        self._failures = 0

    def poll(self) -> int | None:
        """Exit code, or None while the job runs.

        Raises RunFailed if the job server does not answer for two minutes, and, once, if a lost node made the job fail.
        """
        if self._code is None and time.monotonic() >= self._due:
            self._ask()
        return self._code

    def tend(self) -> None:
        """Extract metrics and handshakes from the log. Raises RunFailed, once, when a node of the job is lost."""
        if self._extraction:
            self._extraction.poll()
        if self._code is None and not self._lost:
            self._raise_if(self._nodes.lost(self._ray_id))

    def terminate(self) -> None:
        """Ask Ray to stop the job; `kill` repeats the request if the server does not answer."""
        try:
            self._jobs.stop_job(self.id)
        except (RuntimeError, OSError):
            return
        self._due = 0.0

    def kill(self, *, grace_s: float = 0.0) -> None:
        """Stop the job and wait until it has ended. Raises RunFailed if it goes on or the server is silent."""
        deadline = time.monotonic() + max(grace_s, STOP_PATIENCE_S)
        while self.poll() is None:
            self.terminate()
            if time.monotonic() > deadline:
                raise RunFailed(f"Ray job {self.id} does not end", hint=f"ray job stop {self.id}")
            time.sleep(0.5)

    def _ask(self) -> None:
        try:
            info = self._jobs.get_job_info(self.id)
        except (RuntimeError, OSError) as error:
            self._failed(error)
            return
        self._answered, self._failures = time.monotonic(), 0
        self._due = self._answered + STATUS_PAUSES_S[0]
        self._ray_id = info.job_id or self._ray_id
        state = str(getattr(info.status, "value", info.status))
        if state in ENDED:
            self._end(state, info)

    def _failed(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._answered > SERVER_PATIENCE_S:
            raise RunFailed(
                f"Ray's job server has not answered for {now - self._answered:.0f} s: {str(error)[:300]}",
                hint=f"job {self.id} may still run: `ray job status {self.id}`; go on with --resume auto",
            ) from error
        self._failures = min(self._failures + 1, len(STATUS_PAUSES_S) - 1)
        self._due = now + STATUS_PAUSES_S[self._failures]

    def _end(self, state: str, info: Any) -> None:
        self._follower.finish(LOG_PATIENCE_S)
        code = info.driver_exit_code
        if state == "FAILED" and code is None:
            # there was no driver to report the cause: its environment failed, or its node was lost
            with self._log.open("a", encoding="utf-8") as stream:
                stream.write(f"\nRay: {info.message}\n")
        if self._extraction:
            self._extraction.poll(ended=True)
        self._code = code or ENDED[state]
        if state == "FAILED" and not self._lost:
            self._raise_if(self._nodes.lost_in_the_end(self._ray_id, self._log))

    def _raise_if(self, lost: Lost | None) -> None:
        if lost is None:
            return
        self._lost = True
        raise RunFailed(
            f"the Ray cluster lost node {lost.address}, on which workers of the run were: {lost.reason[:300]}",
            hint="`--resume auto` goes on from the newest checkpoint, once the cluster has nodes enough again",
        )


SILENCE_S = 300.0
"""Seconds without data after which a connection is reopened: it may be dead without either side noticing."""
LOG_PAUSES_S = (5.0, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Seconds before the next connection: after a stream that ended, after the first failure, after the second, and so on.
"""


class LogFollower(threading.Thread):
    """Appends a job's log to a file until the job ends; Ray streams from the start, so known text is skipped."""

    def __init__(self, jobs: Jobs, job_id: str, file: Path) -> None:
        super().__init__(name=f"log of {job_id}", daemon=True)
        self._jobs, self._id, self._file = jobs, job_id, file
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._taken = 0
        """Characters written so far."""

    def run(self) -> None:
        """Follow the log, reconnecting as often as necessary."""
        failures = 0
        while not self._ended.is_set():
            before = self._taken
            try:
                asyncio.run(self._follow())
                failures = 0  # Ray closes the stream when the job has ended, and when its agent is replaced
            except Exception:  # noqa: BLE001 - aiohttp and Ray raise many; the job's state is asked for elsewhere
                failures = 1 if self._taken > before else failures + 1
            self._ended.wait(LOG_PAUSES_S[min(failures, len(LOG_PAUSES_S) - 1)])

    def finish(self, patience_s: float) -> None:
        """After the job has ended, wait for the rest of the stream, and fetch what it does not deliver."""
        self._ended.set()
        self.join(patience_s)
        if self.is_alive():
            with contextlib.suppress(Exception):
                self._take(self._jobs.get_job_logs(self._id), start=0)

    async def _follow(self) -> None:
        position = 0
        stream = cast("AsyncGenerator[str]", self._jobs.tail_job_logs(self._id))
        async with contextlib.aclosing(stream) as chunks:
            while True:
                chunk = await asyncio.wait_for(anext(chunks, None), SILENCE_S)
                if chunk is None:
                    return
                self._take(chunk, start=position)
                position += len(chunk)

    def _take(self, text: str, *, start: int) -> None:
        """Append the new part of `text`, which begins at character `start` of the log."""
        with self._lock:
            new = text[max(self._taken - start, 0) :]
            if new:
                with self._file.open("a", encoding="utf-8", newline="") as stream:
                    stream.write(new)
                self._taken += len(new)


NODES_PAUSE_S = 5.0
"""Seconds between two queries of the cluster's nodes."""
NODE_DEATH_S = 45.0
"""Seconds after which Ray has declared a node dead: five lost health checks, at least 3 s apart; the job itself may
fail at once.
"""
SIGNS_OF_LOSS = re.compile(
    r"ActorDiedError|ActorUnavailableError|NodeDiedError|WorkerCrashedError|Connection (reset|closed|refused)"
    r"|Broken pipe|NCCL|[Gg]loo|died|unreachable|RpcError"
)
"""Patterns in a log that indicate a failure that a lost node may have caused."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A lost node: its address, and Ray's message about it."""

    address: str
    reason: str


class NodeWatch:
    """Notices when a Ray cluster loses a node with actors of a job; verl and vLLM may wait for them forever."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._alive: set[str] = set()
        self._due = 0.0

    def lost(self, job_id: str | None) -> Lost | None:
        """The node with actors of Ray's job `job_id` that died since the first call; None if none, or no answer."""
        now = time.monotonic()
        if job_id is None or now < self._due:
            return None
        self._due = now + NODES_PAUSE_S
        try:
            return self._look(job_id)
        except (RuntimeError, OSError, KeyError, ValueError):
            return None  # another part watches whether the job server answers at all

    def lost_in_the_end(self, job_id: str | None, log: Path) -> Lost | None:
        """The lost node that made a job fail; waits for Ray to report it if the log indicates a lost connection."""
        suspect = len(self._alive) > 1 and SIGNS_OF_LOSS.search("\n".join(last_lines(log, 300)))
        deadline = time.monotonic() + (NODE_DEATH_S if suspect else 0.0)
        while True:
            self._due = 0.0
            found = self.lost(job_id)
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(1.0)

    def _look(self, job_id: str) -> Lost | None:
        for node in self._jobs.listed("nodes"):
            name = node["node_id"]
            if node["state"] == "ALIVE":
                self._alive.add(name)
            elif name in self._alive and self._jobs.listed("actors", job_id=job_id, node_id=name):
                return Lost(node["node_ip"], node.get("state_message") or "no reason given")
        return None


class LogExtraction:
    """Writes `metrics.jsonl`, `plugins/` and `log_ratios/` from the attempt's log.

    On a shared disk verl and the plugins do that themselves.
    """

    def __init__(self, attempt: AttemptPaths) -> None:
        self._attempt = attempt
        self._log_ratios = log_ratios.Printed(attempt.log_ratios)
        self._tail = Tail(attempt.log)
        # nodes that share Ray's folder, such as two on one machine, each send all its lines
        self._written: deque[tuple[int, dict[str, float | None]]] = deque(maxlen=8)

    def poll(self, *, ended: bool = False) -> None:
        """Process the lines that arrived since the last call."""
        for line in self._tail.poll(ended=ended):
            self._take(plain(line))

    def _take(self, line: str) -> None:
        handshake = contract.printed_handshake(line)
        if handshake is not None:
            contract.write_handshake(self._attempt.plugins, handshake)
            return
        if self._log_ratios.take(line):
            return
        failure = reward.printed(line)
        if failure is not None:
            reward.write(self._attempt.root, failure)
            return
        found = read_line(line)
        if found is not None and found not in self._written:
            self._written.append(found)
            step, data = found
            with self._attempt.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, "data": data}) + "\n")


REQUEST_TIMEOUT_S = (5.0, 30.0)
"""Seconds to connect, and to wait for an answer."""
MOST_ROWS = 10_000
"""Largest number of rows that Ray's state API returns."""
OVERRULING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that override the address given to Ray's client (ray/dashboard/utils.py)."""


class Jobs(Protocol):
    """The part of `ray.job_submission.JobSubmissionClient` in use; requests raise RuntimeError or OSError."""

    def submit_job(self, **job: Any) -> str:
        """Submit a job and return its id."""

    def get_job_info(self, job_id: str) -> Any:
        """State of a job: `status`, `message`, `driver_exit_code`."""

    def get_job_logs(self, job_id: str) -> str:
        """A job's complete log so far."""

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """The job's log from its start, in pieces as it grows, until the job ends."""

    def stop_job(self, job_id: str) -> bool:
        """Ask a job to end."""

    def list_jobs(self) -> list[Any]:
        """All jobs known to the cluster."""

    def listed(self, what: str, **filters: str) -> list[dict[str, Any]]:
        """Ray's `nodes` or `actors` whose fields match `filters`."""


def connect(address: str) -> Jobs:
    """Connect to the job server at `address` (its dashboard's http://host:8265, or a cluster's host:6379).

    Raises EnvironmentNotReady if no job server answers there.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types here
        """A client with timeouts: Ray's own requests wait forever for a host that is gone."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            try:
                return super()._do_request(method, endpoint, **{"timeout": REQUEST_TIMEOUT_S, **options})
            except AuthenticationError as error:
                raise PermissionError(str(error)) from error

        def listed(self, what: str, **filters: str) -> Any:
            """List rows from the state API, with the request of `ray list nodes` (ray/util/state/api.py)."""
            params = {
                "limit": MOST_ROWS,
                "timeout": int(REQUEST_TIMEOUT_S[1]),  # Ray answers 500 to a number with a decimal point
                "filter_keys": list(filters),
                "filter_predicates": ["="] * len(filters),
                "filter_values": list(filters.values()),
            }
            response = self._do_request("GET", f"/api/v0/{what}", params=params)
            response.raise_for_status()
            return response.json()["data"]["result"]["result"]

    try:
        with _without(*OVERRULING):
            return _authenticated(lambda: Client(address))
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and requests' own
        raise EnvironmentNotReady(
            f"no Ray job server answers at {address}: {_first_line(error)}",
            hint="--ray-address http://HEAD:8265, the dashboard of a cluster with ray[default]; "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN where it asks for a token (`ray get-auth-token` there)",
        ) from error


def _authenticated(make: Callable[[], Jobs]) -> Jobs:
    """A client; where the cluster asks for a token, with the one that `ray start` and `ray.init` use by default."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    try:
        return make()
    except PermissionError:
        if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
        return make()


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]

"""A launch plan as a Ray job: what is submitted, computed and printable before anything is.

Pure. Ray's entry point is a shell string, the only one that flashrl makes; every word of it is quoted.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.verl import cluster

if TYPE_CHECKING:
    from flashrl_cli.launch.plan import LaunchPlan

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEDUP = "RAY_DEDUP_LOGS_ALLOW_REGEX"
TOLD = rf"{contract.HANDSHAKE_MARK}|step:\d+ - "
"""Lines that Ray must not fold into one: it takes those of two workers for the same if they differ in numbers only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job for Ray's job server at `address`: `runtime_env` reaches the driver and every actor on every node."""

    address: str
    submission_id: str
    command: tuple[str, ...]
    runtime_env: Mapping[str, Any]
    metadata: Mapping[str, str]


def job(plan: LaunchPlan, address: str, *, shared: bool = True) -> Job:
    """The job of a plan; `shared` tells that the attempt's folder is one and the same here and on every node.

    Where it is not, workers tell their handshakes in the log, and verl's metrics file is made on the node that writes it.
    """
    env = dict(plan.env) if shared else cluster.without_shared_folder(plan.env, plan.attempt_paths.root)
    if not shared:
        env[contract.ENV_TELL] = "1"
    env[DEDUP] = f"(?:{env[DEDUP]})|{TOLD}" if DEDUP in env else TOLD
    alone = cluster.driver_only(plan.overrides)
    return Job(
        address=address,
        submission_id=submission_id(plan),
        command=_command(plan.argv, {key: value for key, value in env.items() if key in alone}),
        runtime_env={"env_vars": {key: value for key, value in sorted(env.items()) if key not in alone}},
        metadata={
            "flashrl_run": plan.name,
            "flashrl_attempt": str(plan.attempt),
            "flashrl_folder": str(plan.paths.root),
        },
    )


def submission_id(plan: LaunchPlan) -> str:
    """Name of the job: run, attempt, and a digest of the attempt's folder, since others may use the same name."""
    digest = hashlib.sha256(str(plan.attempt_paths.root).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', plan.name)}-{plan.attempt}-{digest}"


def submission(job: Job) -> dict[str, Any]:
    """The job as plain data, as `submit_job` takes it: for `--dry-run --json`, and for Ray."""
    return {
        "submission_id": job.submission_id,
        "entrypoint": f"exec {shlex.join(job.command)}",
        "runtime_env": dict(job.runtime_env),
        "metadata": dict(job.metadata),
    }


def script(plan: LaunchPlan, job: Job) -> list[str]:
    """The end of a POSIX shell script that submits the job and waits for nothing; the overrides are its arguments `$@`.

    `ray job submit` quotes the words behind `--` for the shell that Ray starts them with.
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


def _command(argv: tuple[str, ...], env: Mapping[str, str]) -> tuple[str, ...]:
    """`argv` with `env` added to the environment of that process alone."""
    return ("env", *(f"{key}={value}" for key, value in env.items()), *argv) if env else argv

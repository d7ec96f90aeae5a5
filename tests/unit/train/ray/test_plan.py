"""A plan as a Ray job: what is submitted."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flashrl_cli.config import presets
from flashrl_cli.config.resolve import load_spec
from flashrl_cli.train import plan as ray_plan
from flashrl_cli.train.plan import LaunchPlan, build_plan, plan_script
from flashrl_cli.verl.environment import on_cluster

NASTY = [
    "plain",
    "a b",
    "it's",
    '"$HOME"',
    "`id`",
    "$(id)",
    "a;b&c|d",
    "\\",
    "a\nb",
    "*",
    "é→",
    "!x",
    "",
    "-n",
    "#no",
    "~",
]
Plan = Callable[..., LaunchPlan]


def planned(preset: str, *sets: str) -> LaunchPlan:
    root = Path("/shared")
    return build_plan(
        on_cluster(load_spec(preset, sets=sets)),
        name="r",
        attempt=2,
        python="/venv/bin/python",
        runs_root=root / "runs",
        checkpoints_root=root / "checkpoints",
        data_root=root / "data",
    )


def test_the_job_of_the_cpu_preset() -> None:
    plan = planned("tiny", "resources.nodes=2")
    job = ray_plan.job_request(plan, "http://head:8265")
    assert job.address == "http://head:8265"
    assert job.command == plan.argv
    assert {**plan.env, "RAY_DEDUP_LOGS_ALLOW_REGEX": ray_plan.TOLD} == job.runtime_env["env_vars"]
    assert set(job.runtime_env) == {"env_vars"}
    assert not [word for word in job.command if "num_gpus" in word or "num_cpus" in word]
    assert "trainer.nnodes=2" in job.command


@pytest.mark.parametrize("preset", [name for name in presets.names() if name != "base"])
def test_every_preset_becomes_a_job(preset: str) -> None:
    plan = planned(preset)
    submission = ray_plan.submission(ray_plan.job_request(plan, "http://head:8265"))
    json.dumps(submission)
    assert submission["entrypoint"].startswith("exec /venv/bin/python -m verl.trainer.main_ppo ")
    assert submission["runtime_env"]["env_vars"]["FLASHRL_PLUGIN_DIR"] == "/shared/runs/r/attempt_2/plugins"


def test_what_verl_hands_on_itself_is_the_drivers_alone() -> None:
    sets = ["env.NCCL_ALGO=Ring", "env.MINE=1", "verl.+ray_kwargs.ray_init.runtime_env.env_vars.HERS=2", "env.HERS=3"]
    job = ray_plan.job_request(planned("dapo-32b", *sets), "http://head:8265")
    assert job.runtime_env["env_vars"].keys() & {"NCCL_ALGO", "MINE", "HERS"} == {"MINE"}
    assert job.command[:4] == ("env", "HERS=3", "NCCL_ALGO=Ring", "/venv/bin/python")


def test_without_a_shared_folder_workers_tell(tiny_plan: Plan) -> None:
    plan = tiny_plan()
    env = ray_plan.job_request(plan, "http://head:8265", shared=False).runtime_env["env_vars"]
    assert env["FLASHRL_TELL"] == "1"
    assert "VERL_FILE_LOGGER_PATH" not in env
    assert env["VERL_FILE_LOGGER_ROOT"] == str(plan.attempt_paths.root / "node")


def test_ray_folds_neither_steps_nor_handshakes_into_one(tiny_plan: Plan) -> None:
    env = ray_plan.job_request(tiny_plan("env.RAY_DEDUP_LOGS_ALLOW_REGEX=mine|ours"), "http://h").runtime_env[
        "env_vars"
    ]
    allowed = re.compile(env["RAY_DEDUP_LOGS_ALLOW_REGEX"])
    for line in ("step:3 - a:1", 'x FLASHRL_HANDSHAKE {"pid": 1}', "mine", "ours"):
        assert allowed.search(line)
    assert not allowed.search("loading")


def test_names_of_jobs() -> None:
    plan = planned("tiny")
    assert re.fullmatch(r"r-2-[0-9a-f]{8}", ray_plan.submission_id(plan))
    assert ray_plan.submission_id(plan) == ray_plan.submission_id(planned("dapo-32b"))


def test_a_jobs_name_fits_into_a_url_and_a_file(tiny_plan: Plan) -> None:
    name = ray_plan.submission_id(dataclasses.replace(tiny_plan(), name="my run: é/#?"))
    assert re.fullmatch(r"my-run-------1-[0-9a-f]{8}", name)


@pytest.mark.processes
@pytest.mark.parametrize("nasty", NASTY)
def test_a_shell_reads_the_entry_point_back(nasty: str, tiny_plan: Plan, tmp_path: Path) -> None:
    printer = tmp_path / "print it"
    printer.write_text('#!/bin/sh\nprintf "%s\\0" "$NCCL_ALGO" "$@"\n')
    printer.chmod(0o755)
    plan = tiny_plan(f"env.NCCL_ALGO={nasty!r}" if nasty.strip() else "env.NCCL_ALGO=''")
    plan = dataclasses.replace(plan, env={**plan.env, "NCCL_ALGO": nasty}, argv=(str(printer), nasty, *plan.argv[2:]))
    entry = ray_plan.submission(ray_plan.job_request(plan, "http://h"))["entrypoint"]
    out = subprocess.run(["sh", "-c", entry], capture_output=True, text=True, check=True).stdout
    assert out.split("\0")[:-1] == [nasty, *plan.argv[1:]]


@pytest.mark.processes
@pytest.mark.parametrize("weird", ["plain", "it's", "a b\nc", "$HOME `x`"])
def test_the_script_submits_the_same_job(weird: str, tmp_path: Path) -> None:
    """A `ray` that prints its arguments stands in for Ray's."""
    ray = tmp_path / "bin/ray"
    ray.parent.mkdir()
    ray.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    ray.chmod(0o755)
    plan = build_plan(
        on_cluster(load_spec("tiny", sets=["env.NCCL_ALGO=Ring"])),
        name=weird,
        attempt=1,
        python="/venv/bin/python",
        runs_root=tmp_path / weird / "runs",
        checkpoints_root=tmp_path / "checkpoints",
        data_root=tmp_path / "data",
    )
    job = ray_plan.job_request(plan, "http://head:8265")
    env = {**os.environ, "PATH": f"{ray.parent}:{os.environ['PATH']}"}
    script = plan_script(plan, ["fits"], job=job)
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

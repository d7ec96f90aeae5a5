"""What a run needs of its machine and of Ray: variables, disk, loggers, arguments of Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli import contract
from flashrl_cli.config.layers import Origin
from flashrl_cli.config.resolve import Resolved
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import Location, Problem
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.verl import environment
from flashrl_cli.verl.config import DATA_PARALLEL, bf16_replicas, engine_devices, replicas
from flashrl_cli.verl.environment import VERL_VARIABLES, driver_only, on_cluster, run_environment, without_shared_folder
from flashrl_cli.verl.overrides import Override, Places, Value, overrides
from tests.specs import load_spec

ATTEMPT = AttemptPaths(Path("/runs/x/attempt_1"))


def test_cuda():
    assert run_environment(load_spec("dapo-32b").spec, ATTEMPT) == {
        "FLASHRL_KEEP_RESPONSES": "256",
        "FLASHRL_KEEP_SAMPLES": "8",
        "FLASHRL_PLATFORM": "cuda",
        "FLASHRL_PLUGIN_DIR": "/runs/x/attempt_1/plugins",
        "HYDRA_FULL_ERROR": "1",
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONUNBUFFERED": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VERL_DATAPROTO_SERIALIZATION_METHOD": "numpy",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "VERL_FILE_LOGGER_PATH": "/runs/x/attempt_1/metrics.jsonl",
    }


def test_cpu_adds_verls_switches():
    found = run_environment(load_spec("tiny").spec, ATTEMPT)
    cpu = {contract.ENV_FORK: "1", "VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VLLM_CPU_KVCACHE_SPACE": "1"}
    assert found["FLASHRL_PLATFORM"] == "cpu"
    assert cpu.items() <= found.items()


def test_trainers_on_a_cpu_share_its_cores():
    assert run_environment(load_spec("tiny").spec, ATTEMPT, cores=6)["OMP_NUM_THREADS"] == "6"
    four = load_spec("tiny", sets=["resources.gpus_per_node=4"]).spec
    assert run_environment(four, ATTEMPT, cores=6)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in run_environment(load_spec("tiny").spec, ATTEMPT)
    assert "OMP_NUM_THREADS" not in run_environment(load_spec("dapo-32b").spec, ATTEMPT, cores=6)


def test_a_mixed_run_counts_its_replicas_and_compiles_for_each():
    """Replicas of two precisions have one configuration, by which vLLM would find the other's compiled model."""
    sets = ["rollout.precision=int8", "rollout.mix=0.25", "resources.nodes=2", "resources.gpus_per_node=8"]
    found = run_environment(load_spec("gsm8k-0.5b", sets=sets).spec, ATTEMPT)
    options = contract.RolloutOptions(**json.loads(found[contract.ENV_ROLLOUT]))
    assert options == contract.RolloutOptions(bf16_replicas=4, bf16_transfer=True)
    assert found["VLLM_DISABLE_COMPILE_CACHE"] == "1"
    plain = run_environment(load_spec("gsm8k-0.5b", sets=["rollout.lm_head_fp32=true"]).spec, ATTEMPT)
    assert json.loads(plain[contract.ENV_ROLLOUT])["lm_head_fp32"]
    assert "VLLM_DISABLE_COMPILE_CACHE" not in plain


def test_no_log_ratios_are_kept_where_none_are_asked_for():
    spec = load_spec("tiny", sets=["correction.keep_responses=0"]).spec
    assert contract.ENV_KEEP not in run_environment(spec, ATTEMPT)
    assert run_environment(load_spec("tiny").spec, ATTEMPT)[contract.ENV_KEEP] == "256"


def test_raw_log_probs_do_not_bring_another_sampler():
    def samplers(preset: str, *sets: str) -> str | None:
        truncated = load_spec(preset, tis="2", sets=["rollout.top_p=0.9", *sets]).spec
        return run_environment(truncated, ATTEMPT).get("VLLM_USE_FLASHINFER_SAMPLER")

    assert samplers("dapo-32b") == "0"
    assert samplers("dapo-32b", "env.VLLM_USE_FLASHINFER_SAMPLER=1") == "1"
    assert samplers("dapo-32b", "rollout.top_k=20", "correction.support=kept") is None
    assert samplers("tiny") is None


def test_weights_go_in_bf16_to_engines_that_hold_bf16():
    def sent(*sets: str) -> bool:
        text = run_environment(load_spec("tiny", sets=sets).spec, ATTEMPT).get(contract.ENV_ROLLOUT, "{}")
        return contract.RolloutOptions(**json.loads(text)).bf16_transfer

    dtype = "verl.actor_rollout_ref.rollout.dtype"
    assert sent()
    assert sent(f"{dtype}=bfloat16")
    assert not sent(f"{dtype}=float16"), "bf16 has three bits less"
    assert not sent("rollout.precision=bf16")


def test_the_plugins_level_is_passed_on_and_a_preset_may_say_another():
    assert run_environment(load_spec("tiny").spec, ATTEMPT, logging="INFO")[contract.ENV_LOGGING] == "INFO"
    spec = load_spec("tiny", sets=["env.FLASHRL_LOGGING_LEVEL=DEBUG"]).spec
    assert run_environment(spec, ATTEMPT, logging="INFO")[contract.ENV_LOGGING] == "DEBUG"
    assert contract.ENV_LOGGING not in run_environment(load_spec("tiny").spec, ATTEMPT)


def test_a_preset_can_change_settings_but_not_the_attempts_files():
    spec = load_spec("tiny", sets=["env.VLLM_CPU_KVCACHE_SPACE=4", "env.FLASHRL_PLUGIN_DIR=/x", "env.MINE=1"]).spec
    found = run_environment(spec, ATTEMPT)
    assert (found["VLLM_CPU_KVCACHE_SPACE"], found["MINE"]) == ("4", "1")
    assert found["FLASHRL_PLUGIN_DIR"] == "/runs/x/attempt_1/plugins"


def spec(preset: str, *sets: str) -> RunSpec:
    return load_spec(preset, sets=sets).spec


@pytest.mark.parametrize(
    ("preset", "sets", "expected"),
    [
        ("tiny", [], 12),
        ("gsm8k-0.5b", [], 24),
        ("tiny", [f"verl.{environment.SAVED}=[model]"], 4),
        ("tiny", [f"verl.{environment.SAVED}=[model,optimizer,extra,hf_model]"], 14),
        ("tiny", ["verl.actor_rollout_ref.model.lora_rank=32"], 4),
    ],
)
def test_bytes_a_parameter(preset: str, sets: list[str], expected: int) -> None:
    assert environment.checkpoint_bytes(spec(preset, *sets), 1000) == expected * 1000


def test_bytes_of_a_measured_checkpoint() -> None:
    assert environment.checkpoint_bytes(spec("tiny"), 366_000) == pytest.approx(1_464_996 + 2_928_624, rel=0.01)


def test_what_was_sampled_ahead_takes_space_in_asynchronous_modes() -> None:
    ahead = ("trainer.mode=colocate_async", "trainer.prefetch=0.5")
    more = environment.checkpoint_bytes(spec("tiny", *ahead), 1000) - environment.checkpoint_bytes(spec("tiny"), 1000)
    assert more == 48 * 8 * (64 * 28 + 16 * 72)


@pytest.mark.parametrize(
    ("sets", "kept"),
    [
        (["trainer.steps=15", "trainer.save_every=5"], 3),
        (["trainer.steps=16", "trainer.save_every=5"], 4),
        (["trainer.save_every=-1"], 0),
        (["trainer.steps=null", "trainer.save_every=5"], None),
        (["trainer.steps=null", "trainer.save_every=5", f"verl.{environment.KEPT}=2"], 2),
        (["trainer.steps=15", "trainer.save_every=5", f"verl.{environment.KEPT}=9"], 3),
        (["trainer.steps=15", "trainer.save_every=5", f"verl.{environment.KEPT}=1"], 1),
    ],
)
def test_checkpoints_kept(sets: list[str], kept: int | None) -> None:
    assert environment.checkpoints_kept(spec("tiny", *sets)) == kept


def counted(nodes: int, gpus: int, mix: float, *more: str) -> tuple[int, int]:
    sets = ["rollout.precision=int8", f"resources.nodes={nodes}", f"resources.gpus_per_node={gpus}"]
    spec = load_spec("gsm8k-0.5b", sets=[*sets, f"rollout.mix={mix}", *more]).spec
    return replicas(spec), bf16_replicas(spec)


@pytest.mark.parametrize(
    ("nodes", "gpus", "mix", "found"),
    [(1, 1, 0, (1, 0)), (1, 8, 0, (8, 0)), (1, 8, 0.01, (8, 1)), (1, 8, 0.5, (8, 4)), (1, 2, 0.6, (2, 2))],
)
def test_a_share_is_rounded_up(nodes: int, gpus: int, mix: float, found: tuple[int, int]) -> None:
    assert counted(nodes, gpus, mix) == found


def test_what_is_whole_in_decimals_is_whole() -> None:
    assert counted(10, 10, 0.07) == (100, 7)


@pytest.mark.parametrize("key", [DATA_PARALLEL, f"+{DATA_PARALLEL}"])
def test_an_engine_takes_several_devices(key: str) -> None:
    more = ("rollout.tensor_parallel=2", f"verl.{key}=2")
    assert counted(1, 8, 0.5, *more) == (2, 1)
    assert engine_devices(load_spec("gsm8k-0.5b", sets=more).spec) == 4


WHY = Origin("option", Location("--set"))


PLACES = Places(name="r", data=Path("/data"), checkpoints=Path("/c"))


def override(key: str, value: Value) -> Override:
    return Override(key, value, WHY, added=True)


def keys(resolved: Resolved) -> set[str]:
    return {override.key for override in overrides(resolved, PLACES)}


def test_the_cpu_platform_brings_no_ray_of_its_own() -> None:
    before, after = load_spec("tiny"), on_cluster(load_spec("tiny"))
    dropped = {
        "ray_kwargs.ray_init.num_gpus",
        "ray_kwargs.ray_init.num_cpus",
        "ray_kwargs.ray_init.include_dashboard",
    }
    assert keys(before) - keys(after) == dropped
    assert keys(after) < keys(before)
    assert not [key for key in after.origins if "ray_init" in key]


def test_a_gpu_preset_stays_as_it_is_but_for_the_dashboard() -> None:
    before, after = load_spec("dapo-32b"), on_cluster(load_spec("dapo-32b"))
    assert keys(before) - keys(after) == {"ray_kwargs.ray_init.include_dashboard"}
    assert keys(after) < keys(before)


@pytest.mark.parametrize(
    ("key", "stays"),
    [
        ("+ray_kwargs.ray_init.runtime_env.env_vars.A", True),
        ("+ray_kwargs.ray_init.log_to_driver", True),
        ("ray_kwargs.timeline_json_file", True),
        ("+ray_kwargs.ray_init.resources.big", False),
        ("+ray_kwargs.ray_init.address", False),
        ("ray_kwargs.ray_init.num_cpus", False),
        ("+data.num_cpus", True),
    ],
)
def test_which_keys_make_a_ray_of_ones_own(key: str, stays: bool) -> None:
    kept = on_cluster(load_spec("dapo-32b", sets=[f"verl.{key}=1"])).spec.verl
    assert (key in kept) is stays


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ray_kwargs.ray_init.runtime_env.env_vars.MINE", "1"),
        ("ray_kwargs.ray_init.runtime_env.env_vars", {"MINE": "1"}),
        ("ray_kwargs.ray_init.runtime_env", {"env_vars": {"MINE": "1"}}),
        ("ray_kwargs.ray_init", {"runtime_env": {"env_vars": {"MINE": "1"}}}),
    ],
)
def test_variables_that_verl_hands_on_are_the_drivers_alone(key: str, value: Value) -> None:
    assert driver_only([override(key, value)]) == VERL_VARIABLES | {"MINE"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ray_kwargs.ray_init.runtime_env", {"working_dir": "/x"}),
        ("ray_kwargs.ray_init.runtime_env", None),
        ("ray_kwargs.ray_init.runtime_env.env_vars_of_mine.A", 1),
        ("data.env_vars.A", 1),
    ],
)
def test_other_keys_name_none(key: str, value: Value) -> None:
    assert driver_only([override(key, value)]) == VERL_VARIABLES


def test_metrics_lie_below_a_root_that_verl_makes_itself() -> None:
    env = {"VERL_FILE_LOGGER_PATH": "/runs/r/attempt_1/metrics.jsonl", "A": "1"}
    assert without_shared_folder(env, Path("/runs/r/attempt_1")) == {
        "A": "1",
        "VERL_FILE_LOGGER_ROOT": "/runs/r/attempt_1/node",
    }


def problems(
    name: str, home: Path, variables: dict[str, str] | None = None, *, installed: bool = True
) -> list[Problem]:
    return list(environment.problems([name], variables or {}, lambda _: installed, home))


@pytest.mark.parametrize("name", ["console", "file", "tensorboard", "mlflow", "trackio", "rl_insight"])
def test_loggers_that_need_at_most_a_package(name: str, tmp_path: Path) -> None:
    own = name in {"console", "file"}
    assert not problems(name, tmp_path)
    hints = [problem.hint for problem in problems(name, tmp_path, installed=False)]
    assert hints == ([] if own else [f"`pip install {name.replace('_', '-')}`"])
    assert list(environment.demanding((name, "nope"))) == ([] if own else [name])


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("wandb", {"WANDB_API_KEY": "k"}),
        ("wandb", {"WANDB_MODE": "offline"}),
        ("wandb", {"WANDB_MODE": "disabled"}),
        ("wandb", {"WANDB_IDENTITY_TOKEN_FILE": "/t"}),
        ("swanlab", {"SWANLAB_API_KEY": "k"}),
        ("swanlab", {"SWANLAB_MODE": "local"}),
        ("swanlab", {"SWANLAB_MODE": "disabled"}),
        ("clearml", {"CLEARML_API_ACCESS_KEY": "a", "CLEARML_API_SECRET_KEY": "b"}),
        ("vemlp_wandb", dict.fromkeys(environment.VEMLP, "x")),
    ],
)
def test_logins_from_the_environment(name: str, variables: dict[str, str], tmp_path: Path) -> None:
    assert not problems(name, tmp_path, variables)
    (problem,) = problems(name, tmp_path, dict.fromkeys(variables, ""))
    assert problem == Problem("not logged in", name, environment.LOGGERS[name].how)


def test_a_package_comes_before_its_login(tmp_path: Path) -> None:
    (problem,) = problems("wandb", tmp_path, installed=False)
    assert problem == Problem("the package wandb is not installed", "wandb", "`pip install wandb`")


@pytest.mark.parametrize("mode", ["online", "shared", "x"])
def test_other_modes_need_a_login(mode: str, tmp_path: Path) -> None:
    assert problems("wandb", tmp_path, {"WANDB_MODE": mode})
    assert problems("swanlab", tmp_path, {"SWANLAB_MODE": mode})


@pytest.mark.parametrize(
    ("text", "variables", "logged_in"),
    [
        ("machine api.wandb.ai login user password k\n", {}, True),
        ("machine elsewhere login user password k\n", {}, False),
        ("machine corp login user password k\n", {"WANDB_BASE_URL": "https://corp:8080"}, True),
        ("machine api.wandb.ai login user password k\n", {"WANDB_BASE_URL": "https://corp"}, False),
        ("nonsense", {}, False),
        ("", {}, False),
    ],
)
def test_wandb_s_netrc(text: str, variables: dict[str, str], logged_in: bool, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(text)
    (tmp_path / ".netrc").chmod(0o600)
    assert (not problems("wandb", tmp_path, variables)) is logged_in


def test_a_netrc_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    file.write_text("machine api.wandb.ai login user password k\n")
    file.chmod(0o600)
    assert problems("wandb", tmp_path)
    assert not problems("wandb", tmp_path, {"NETRC": str(file)})


def test_files_of_other_logins(tmp_path: Path) -> None:
    assert problems("swanlab", tmp_path)
    (tmp_path / ".swanlab").mkdir()
    (tmp_path / ".swanlab/.netrc").write_text("")
    assert not problems("swanlab", tmp_path)
    assert problems("clearml", tmp_path)
    (tmp_path / "clearml.conf").write_text("")
    assert not problems("clearml", tmp_path)


def test_every_problem_is_reported_an_unknown_logger_among_them(tmp_path: Path) -> None:
    found = list(environment.problems(("console", "wandb", "nope", "swanlab"), {}, lambda _: True, tmp_path))
    assert [problem.where for problem in found] == ["wandb", "nope", "swanlab"]
    assert found[1].message == "verl has no logger nope"
    assert "wandb" in str(found[1].hint)

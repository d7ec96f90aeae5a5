"""What a run needs of the machine and of Ray.

That is environment variables, disk space for checkpoints, loggers with their packages and logins, and
arguments of Ray. verl constructs its loggers after the models are loaded (verl/utils/tracking.py:62-189), so without
this check a missing package or login would end a run minutes after its start.
"""

from __future__ import annotations

import dataclasses
import math
import netrc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flashrl_cli import contract, paths
from flashrl_cli.errors import Problem
from flashrl_cli.precision import BY_METHOD
from flashrl_cli.reward_function import Reference, Shipped, is_reference
from flashrl_cli.verl.config import bf16_replicas
from flashrl_cli.verl.overrides import MODEL, takes_raw_log_probs

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec, VerlValue
    from flashrl_cli.paths import AttemptPaths
    from flashrl_cli.verl.overrides import Override

DTYPE = "actor_rollout_ref.rollout.dtype"
METRICS_PATH = "VERL_FILE_LOGGER_PATH"
COMMON = {
    "HYDRA_FULL_ERROR": "1",  # without it Hydra shortens the traceback that shows why a worker died
    # images often set it; without compiled modules each of a run's processes compiles 7,000 (15 s of a core) again
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # every response is sent to a reward worker: 0.2 ms with it, 0.7 ms as torch saves a batch (verl/protocol.py:377)
    "VERL_DATAPROTO_SERIALIZATION_METHOD": "numpy",
    # Ray otherwise starts an idle worker for each of its logical CPUs ahead of need, and some for the first driver
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}
CPU = {
    "VERL_PLATFORM": "cpu",  # the platform that flashrl's plugin registers
    "VERL_ENGINE_DEVICE": "cuda",  # verl registers its training engines for cuda and npu only; the switch is verl's
    "RAY_enable_metrics_collection": "0",  # of Ray itself, which nobody reads here
    contract.ENV_FORK: "1",
    **contract.ENGINE,
}
CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Modules that ask for GPUs while they are imported then leave CUDA alone, so that processes may begin as forks
(plugins/forkserver.py).
"""
MIXED = {
    # vLLM caches compiled models by their configuration, which replicas of two precisions share
    # (vllm/compilation/decorators.py:525); verl switches the cache off, too, unless the environment sets the variable
    # (verl/trainer/constants_ppo.py:93)
    "VLLM_DISABLE_COMPILE_CACHE": "1",
}
OWN_SAMPLER = {
    # with raw log-probs vLLM would take FlashInfer's top-k and top-p (v1/sample/ops/topk_topp_sampler.py:86 in 0.24),
    # which is compiled when it is first used and needs CUDA's compiler
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
OWNED = frozenset(
    {
        *(contract.ENV_PLUGIN_DIR, contract.ENV_PLATFORM, contract.ENV_ROLLOUT, contract.ENV_KEEP),
        *(contract.ENV_REWARD, contract.ENV_SAMPLES, METRICS_PATH),
    }
)
"""Variables that a preset cannot set, because flashrl finds an attempt's files by them."""


THREADS = "OMP_NUM_THREADS"
"""Number of threads of torch in a process. Ray sets 1 for actors that ask for no CPUs, as verl's trainers do, unless it
is set (ray/_private/utils.py:235).
"""


def run_environment(
    spec: RunSpec, attempt: AttemptPaths, *, logging: str | None = None, cores: int | None = None
) -> dict[str, str]:
    """The variables that a run adds to the environment.

    Those of the preset's `env` replace flashrl's defaults; those of the attempt's files replace both. `logging` is the
    log level of the plugins, which a job of a Ray cluster would not inherit. `cores` is the number of cores that the
    trainers of a run on CPUs share, None if it is not flashrl that decides.
    """
    level = {} if logging is None else {contract.ENV_LOGGING: logging}
    on_cpu = spec.resources.platform == "cpu"
    platform = CPU if on_cpu else CUDA | OWN_SAMPLER if takes_raw_log_probs(spec) else CUDA
    if on_cpu and cores:
        platform = platform | {THREADS: str(max(1, cores // spec.resources.gpus_per_node))}
    own = {
        contract.ENV_PLUGIN_DIR: str(attempt.plugins),
        contract.ENV_PLATFORM: spec.resources.platform,
        # verl's logger truncates the file it opens, so every attempt needs its own (verl/utils/tracking.py:541)
        METRICS_PATH: str(attempt.metrics),
    }
    options = rollout_options(spec)
    if options != contract.PLAIN:
        own[contract.ENV_ROLLOUT] = options.text()
    if spec.reward.function is not None and is_reference(spec.reward.function):
        own[contract.ENV_REWARD] = shipped(spec, attempt).text()
    if spec.correction.keep_responses:
        own[contract.ENV_KEEP] = str(spec.correction.keep_responses)
    if spec.trainer.keep_samples:
        own[contract.ENV_SAMPLES] = str(spec.trainer.keep_samples)
    if options.bf16_replicas:
        own |= MIXED
    return dict(sorted((COMMON | platform | level | spec.env | own).items()))


def shipped(spec: RunSpec, attempt: AttemptPaths) -> Shipped:
    """The reward function of a run that has one, as its reward workers find it in the attempt's folder."""
    reward = spec.reward
    reference = Reference.parse(reward.function or "")
    return Shipped(
        copy=str(attempt.reward),
        file=str(reference.file),
        name=reference.name,
        arguments=reward.arguments,
        sources=reward.sources,
        timeout_s=reward.timeout_s,
        threshold=reward.threshold,
    )


def rollout_options(spec: RunSpec) -> contract.RolloutOptions:
    """What the plugins do to a run's rollout engines besides setting their precision."""
    rollout = spec.rollout
    profile = None if rollout.profile is None else str(paths.absolute(rollout.profile))
    return contract.RolloutOptions(
        profile=profile,
        bf16_replicas=bf16_replicas(spec),
        lm_head_fp32=rollout.lm_head_fp32,
        bf16_transfer=rollout.precision in BY_METHOD and _engine_is_bf16(spec),
        rotation=0 if rollout.rotation == "off" else rollout.rotation,
    )


def _engine_is_bf16(spec: RunSpec) -> bool:
    """Whether the rollout engine casts all its weights to bf16, which is verl's default.

    This holds for dense models; verl/lint refuses experts in 8 bits.
    """
    return spec.verl.get(DTYPE, "bfloat16") in {"bfloat16", "bf16"}


SAVED = "actor_rollout_ref.actor.checkpoint.save_contents"
KEPT = "trainer.max_actor_ckpt_to_keep"
KEEP_ONE = f"--set verl.{KEPT}=1"
BYTES = {"model": 4, "optimizer": 8, "hf_model": 2}
"""Bytes per parameter of each part of a checkpoint.

The parts are weights in float32, Adam's two moments in float32, and an export in bfloat16. Measured on a checkpoint of
`tiny`: 1,464,996 and 2,928,624 bytes for 0.366 M parameters.
"""


def checkpoint_bytes(spec: RunSpec, parameters: int) -> int:
    """Bytes of one checkpoint of a policy with `parameters` parameters; a critic counts as much as the policy.

    With LoRA the optimizer holds the state of the adapters only, whose size is neglected. Responses that an
    asynchronous mode has sampled ahead are assumed to have full length.
    """
    contents = _given(spec, SAVED, ["model", "optimizer"])
    held = {str(name) for name in (contents if isinstance(contents, list) else [contents])}
    if _given(spec, f"{MODEL}.lora_rank", 0):
        held.discard("optimizer")
    models = 2 if spec.algorithm.advantage == "gae" else 1
    return models * parameters * sum(size for name, size in BYTES.items() if name in held) + _queue_bytes(spec)


QUEUE_BYTES = {"prompt": 28, "response": 72}
"""Bytes in the transfer queue of a token of a prompt and of a response that was trained on.

A prompt's token has three fields of 8 bytes and one of 4, a response's five of 8 and eight of 4, as read from a
checkpoint of `tiny`.
"""


def _queue_bytes(spec: RunSpec) -> int:
    """Bytes of a checkpoint's transfer queue: the batch of its step, which is still in it, and those sampled ahead."""
    if spec.trainer.mode == "sync":
        return 0
    data = spec.data
    response = QUEUE_BYTES["prompt"] * data.max_prompt_length + QUEUE_BYTES["response"] * data.max_response_length
    return math.ceil((1 + spec.trainer.prefetch) * data.train_batch_size) * spec.rollout.n * response


def checkpoints_kept(spec: RunSpec) -> int | None:
    """Number of checkpoints that are on the disk when the run ends.

    None if verl keeps all of them and the number of steps is not known.
    """
    trainer = spec.trainer
    if trainer.save_every <= 0:
        return 0
    limit = _given(spec, KEPT, None)
    saved = -(-trainer.steps // trainer.save_every) if trainer.steps else None
    if isinstance(limit, int) and limit > 0:
        return limit if saved is None else min(limit, saved)
    return saved


def _given(spec: RunSpec, key: str, default: VerlValue) -> VerlValue:
    """Value that a preset gives to a verl key under `verl:`; `default` if it gives none."""
    return spec.verl.get(key, spec.verl.get(f"+{key}", default))


Login = Callable[[Mapping[str, str], Path], bool]
"""Function that judges, from the environment and the home folder, whether the user is logged in."""
WANDB_AWAY = {"offline", "disabled", "dryrun"}
SWANLAB_AWAY = {"local", "offline", "disabled"}
VEMLP = ("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY", "MLP_TRACKING_REGION")


@dataclass(frozen=True, slots=True)
class Logger:
    """One of verl's loggers: the module it imports, the package with that module, the login, and how to log in."""

    module: str | None = None
    package: str | None = None
    login: Login | None = None
    how: str | None = None


def wandb_login(environment: Mapping[str, str], home: Path) -> bool:
    """Whether Weights & Biases has a key, an identity token, an entry in netrc, or a mode without a server."""
    if environment.get("WANDB_MODE", "").lower() in WANDB_AWAY:
        return True
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    files = (Path(environment["NETRC"]),) if environment.get("NETRC") else (home / ".netrc", home / "_netrc")
    return any(_names(file, host) for file in files)


def swanlab_login(environment: Mapping[str, str], home: Path) -> bool:
    """Whether SwanLab has a key, the file that `swanlab login` writes, or a mode without a server."""
    if environment.get("SWANLAB_MODE", "").lower() in SWANLAB_AWAY or environment.get("SWANLAB_API_KEY"):
        return True
    return (Path(environment.get("SWANLAB_SAVE_DIR") or home / ".swanlab") / ".netrc").is_file()


def clearml_login(environment: Mapping[str, str], home: Path) -> bool:
    """Whether ClearML has its two keys, or the file that `clearml-init` writes."""
    keys = ("CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY")
    file = Path(environment.get("CLEARML_CONFIG_FILE") or home / "clearml.conf")
    return all(environment.get(key) for key in keys) or file.is_file()


def vemlp_login(environment: Mapping[str, str], _: Path) -> bool:
    """Whether the three variables that verl reads are set (verl/utils/tracking.py:150-152)."""
    return all(environment.get(key) for key in VEMLP)


def _names(file: Path, host: str) -> bool:
    """Whether a netrc file has an entry for a host."""
    try:
        return host in netrc.netrc(file).hosts
    except (OSError, netrc.NetrcParseError):
        return False


LOGGERS = {
    "console": Logger(),
    "file": Logger(),
    "wandb": Logger("wandb", "wandb", wandb_login, "`wandb login`, or WANDB_API_KEY, or WANDB_MODE=offline"),
    "tensorboard": Logger("tensorboard", "tensorboard"),
    "mlflow": Logger("mlflow", "mlflow"),
    "swanlab": Logger(
        "swanlab", "swanlab", swanlab_login, "`swanlab login`, or SWANLAB_API_KEY, or SWANLAB_MODE=local"
    ),
    "trackio": Logger("trackio", "trackio"),
    "clearml": Logger("clearml", "clearml", clearml_login, "`clearml-init`"),
    "vemlp_wandb": Logger("volcengine_ml_platform", "volcengine-ml-platform", vemlp_login, f"set {', '.join(VEMLP)}"),
    "rl_insight": Logger("rl_insight", "rl-insight"),
}
"""The loggers of verl 0.9.1 by name (verl/utils/tracking.py:49-60), and what each needs."""


def problems(
    names: Sequence[str], environment: Mapping[str, str], installed: Callable[[str], bool], home: Path
) -> Iterator[Problem]:
    """Yield what keeps a run's loggers from starting; `installed` says whether a module can be imported."""
    for name in names:
        logger = LOGGERS.get(name)
        if logger is None:
            yield Problem(f"verl has no logger {name}", where=name, hint=f"one of {', '.join(LOGGERS)}")
        elif logger.module and not installed(logger.module):
            yield Problem(
                f"the package {logger.package} is not installed", where=name, hint=f"`pip install {logger.package}`"
            )
        elif logger.login and not logger.login(environment, home):
            yield Problem("not logged in", where=name, hint=logger.how)


def demanding(names: Sequence[str]) -> Iterator[str]:
    """Yield the loggers among `names` that need a package beyond verl itself."""
    for name in names:
        if name in LOGGERS and LOGGERS[name].module:
            yield name


RAY_INIT = "ray_kwargs.ray_init"
ENV_VARS = f"{RAY_INIT}.runtime_env.env_vars"
REFUSED_ON_A_CLUSTER = (
    *("num_cpus", "num_gpus", "resources", "labels", "object_store_memory", "_system_config"),
    *("_enable_object_reconstruction", "_node_name"),
)
"""Arguments with which `ray.init` raises ValueError where it finds a cluster to join (ray/_private/worker.py:1936)."""
OWN_RAY = frozenset(
    {
        "num_cpus", "num_gpus", "resources", "labels", "object_store_memory", "_system_config",
        "_enable_object_reconstruction", "include_dashboard", "dashboard_host", "dashboard_port", "address",
        "_node_ip_address", "_temp_dir", "_redis_password", "_plasma_directory",
    }
)  # fmt: skip
"""Arguments of `ray.init` that configure a newly started Ray; `ray.init` refuses most of them on a cluster
(ray/_private/worker.py:1936).
"""
VERL_VARIABLES = frozenset(
    {
        "VERL_FULL_DETERMINISM", "VLLM_BATCH_INVARIANT", "VERL_RL_INSIGHT_ENABLE", "PYTHONHASHSEED",
        "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC", "NCCL_DETERMINISTIC", "NCCL_ALGO",
        "TRANSFER_QUEUE_ENABLE",
    }
)  # fmt: skip
"""Variables that verl itself hands to its workers; Ray refuses a job that sets them a second time.

verl takes them from the driver's environment or sets them (verl/trainer/constants_ppo.py:141,
verl/trainer/main_ppo.py:69).
"""
CPUS_A_DEVICE = 3
"""Ray CPUs that verl reserves with each GPU, on the GPU's node (verl/single_controller/ray/base.py:146 and 192)."""
CPUS_A_ROLLOUT_DEVICE = 2
"""Ray CPUs that verl reserves with each GPU of engines alone (verl/workers/rollout/replica.py:205)."""
LOGGER_ROOT = "VERL_FILE_LOGGER_ROOT"


def on_cluster(resolved: Resolved) -> Resolved:
    """The preset without the verl keys that configure a newly started Ray, some of which CPU presets have."""
    kept = {key: value for key, value in resolved.spec.verl.items() if not _makes_own_ray(key.removeprefix("+"))}
    dropped = {f"verl.{key}" for key in resolved.spec.verl.keys() - kept.keys()}
    return dataclasses.replace(
        resolved,
        spec=resolved.spec.model_copy(update={"verl": kept}),
        origins={key: origin for key, origin in resolved.origins.items() if key not in dropped},
    )


def _makes_own_ray(key: str) -> bool:
    prefix = f"{RAY_INIT}."
    return key.startswith(prefix) and key.removeprefix(prefix).partition(".")[0] in OWN_RAY


def ray_arguments(verl: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ray.init` that a preset's verl keys set, at whatever depth; those set to null are left out."""
    found: dict[str, Any] = {}
    for key, value in verl.items():
        found.update(_below(RAY_INIT, key.removeprefix("+"), value))
    return {name: value for name, value in found.items() if value is not None}


def worker_variables(verl: Mapping[str, Any]) -> dict[str, str]:
    """Environment variables that a preset's verl keys set for Ray's workers only."""
    found: dict[str, str] = {}
    for key, value in verl.items():
        found.update({name: str(text) for name, text in _below(ENV_VARS, key.removeprefix("+"), value).items()})
    return found


def driver_only(overrides: Iterable[Override]) -> frozenset[str]:
    """Variables that may be in the driver's environment only, not in that of the Ray job.

    verl hands them to its workers, and Ray refuses variables that are set twice.
    """
    return VERL_VARIABLES.union(*(_below(ENV_VARS, o.key, o.value) for o in overrides))


def _below(parent: str, key: str, value: object) -> dict[str, Any]:
    """Values that a key sets directly below `parent`, whether written as a dotted key or as nested maps."""
    if key.startswith(f"{parent}."):
        return {key.removeprefix(f"{parent}."): value}
    if isinstance(value, Mapping):
        if key == parent:
            return dict(value)
        if parent.startswith(f"{key}."):
            name = parent.removeprefix(f"{key}.").partition(".")[0]
            return _below(parent, f"{key}.{name}", value.get(name))
    return {}


def without_shared_folder(env: Mapping[str, str], attempt: Path) -> dict[str, str]:
    """The environment for a cluster whose nodes do not share the attempt's folder.

    verl then gets a root folder for its metrics: it creates folders below a root, but not those above a file.
    """
    return {key: value for key, value in env.items() if key != METRICS_PATH} | {LOGGER_ROOT: str(attempt / "node")}

"""What a run needs of the machine and of Ray: environment variables, flash-attn, disk for checkpoints, loggers, arguments of Ray.

verl constructs its loggers after the models are loaded (verl/utils/tracking.py:62-189), so that a package or login
which is missing would be found minutes into a run.
"""

from __future__ import annotations

import dataclasses
import netrc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flashrl_cli import contract, paths
from flashrl_cli.errors import Problem
from flashrl_cli.precision import BY_METHOD
from flashrl_cli.verl.config import MODEL, ROLES, bf16_replicas

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec, VerlValue
    from flashrl_cli.paths import AttemptPaths
    from flashrl_cli.verl.overrides import Override

DTYPE = "actor_rollout_ref.rollout.dtype"
METRICS_PATH = "VERL_FILE_LOGGER_PATH"
COMMON = {
    "HYDRA_FULL_ERROR": "1",  # Hydra otherwise cuts the traceback that shows why a worker died
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
CPU = {
    "VERL_PLATFORM": "cpu",  # the platform that flashrl's plugin registers
    "VERL_ENGINE_DEVICE": "cuda",  # verl registers its training engines for cuda and npu only; this is its own switch
    "RAY_enable_worker_prestart": "0",  # Ray otherwise starts idle workers for its 16 logical CPUs before anybody asks
    **contract.ENGINE,
}
MIXED = {
    # vLLM finds compiled models by their configuration, which replicas of two precisions share
    # (vllm/compilation/decorators.py:525); verl switches that off, too, unless the environment says otherwise
    # (verl/trainer/constants_ppo.py:93)
    "VLLM_DISABLE_COMPILE_CACHE": "1",
}
OWNED = frozenset({contract.ENV_PLUGIN_DIR, contract.ENV_PLATFORM, contract.ENV_ROLLOUT, METRICS_PATH})
"""Variables that a preset cannot set: files of the attempt are found by them."""


def run_environment(spec: RunSpec, attempt: AttemptPaths, *, logging: str | None = None) -> dict[str, str]:
    """What a run adds to the environment: flashrl's, the preset's `env` over it, then the attempt's files.

    `logging` is the plugins' level, which a job of a Ray cluster would not inherit.
    """
    level = {} if logging is None else {contract.ENV_LOGGING: logging}
    platform = CPU if spec.resources.platform == "cpu" else {}
    own = {
        contract.ENV_PLUGIN_DIR: str(attempt.plugins),
        contract.ENV_PLATFORM: spec.resources.platform,
        # verl's logger truncates the file it opens, so that every attempt needs its own (verl/utils/tracking.py:541).
        METRICS_PATH: str(attempt.metrics),
    }
    options = rollout_options(spec)
    if options != contract.PLAIN:
        own[contract.ENV_ROLLOUT] = options.text()
    if options.bf16_replicas:
        own |= MIXED
    return dict(sorted((COMMON | platform | level | spec.env | own).items()))


def rollout_options(spec: RunSpec) -> contract.RolloutOptions:
    """What the plugins do to a run's rollout engines beside their precision."""
    rollout = spec.rollout
    profile = None if rollout.profile is None else str(paths.absolute(rollout.profile))
    return contract.RolloutOptions(
        profile=profile,
        bf16_replicas=bf16_replicas(spec),
        lm_head_fp32=rollout.lm_head_fp32,
        bf16_transfer=rollout.precision in BY_METHOD and _engine_is_bf16(spec),
    )


def _engine_is_bf16(spec: RunSpec) -> bool:
    """Whether an engine of a dense model (verl/lint refuses 8-bit experts) casts all its weights to bf16, verl's own default."""
    return spec.verl.get(DTYPE, "bfloat16") in {"bfloat16", "bf16"}


FLASH = "flash_attention_2"
"""verl's default (verl/workers/config/model.py:185)."""
SAVED = "actor_rollout_ref.actor.checkpoint.save_contents"
KEPT = "trainer.max_actor_ckpt_to_keep"
WITHOUT_FLASH = f"--set verl.+{ROLES['actor'].attention}=sdpa --set verl.{ROLES['actor'].padding}=false"
"""Options of a run that needs no flash-attn; slower, and not for a critic or for sequence parallelism."""
KEEP_ONE = f"--set verl.{KEPT}=1"
BYTES = {"model": 4, "optimizer": 8, "hf_model": 2}
"""Bytes a parameter of what a checkpoint may hold: weights in float32, Adam's two moments in float32, an export in
bfloat16. Measured on a checkpoint of `tiny`: 1,464,996 and 2,928,624 bytes for 0.366 M parameters.
"""


def needs_flash(spec: RunSpec) -> bool:
    """Whether a run on GPUs dies without flash-attn, as it is configured."""
    return cannot_do_without_flash(spec) or str(_given(spec, ROLES["actor"].attention, FLASH)) == FLASH


def cannot_do_without_flash(spec: RunSpec) -> bool:
    """Whether no option helps: verl loads a critic with flash-attn always (verl/utils/model.py:649), Ulysses cuts unpadded sequences."""
    parallel = _given(spec, ROLES["actor"].sequence_parallel[0], 1)
    return spec.algorithm.advantage == "gae" or (isinstance(parallel, int) and parallel > 1)


def checkpoint_bytes(spec: RunSpec, parameters: int) -> int:
    """Bytes of one checkpoint of a policy with so many parameters, a critic counted as large as the policy.

    With LoRA the optimizer holds the adapters alone, whose size does not count.
    """
    contents = _given(spec, SAVED, ["model", "optimizer"])
    held = {str(name) for name in (contents if isinstance(contents, list) else [contents])}
    if _given(spec, f"{MODEL}.lora_rank", 0):
        held.discard("optimizer")
    models = 2 if spec.algorithm.advantage == "gae" else 1
    return models * parameters * sum(size for name, size in BYTES.items() if name in held)


def checkpoints_kept(spec: RunSpec) -> int | None:
    """Checkpoints that are on the disk in the end: 0 for none; None where verl keeps all and their number is not known."""
    trainer = spec.trainer
    if trainer.save_every <= 0:
        return 0
    limit = _given(spec, KEPT, None)
    saved = -(-trainer.steps // trainer.save_every) if trainer.steps else None
    if isinstance(limit, int) and limit > 0:
        return limit if saved is None else min(limit, saved)
    return saved


def _given(spec: RunSpec, key: str, default: VerlValue) -> VerlValue:
    """Value that a preset gives to a verl key word for word."""
    return spec.verl.get(key, spec.verl.get(f"+{key}", default))


Login = Callable[[Mapping[str, str], Path], bool]
"""Whether there is a login, from the environment and the home folder."""
WANDB_AWAY = {"offline", "disabled", "dryrun"}
SWANLAB_AWAY = {"local", "offline", "disabled"}
VEMLP = ("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY", "MLP_TRACKING_REGION")


@dataclass(frozen=True, slots=True)
class Logger:
    """One of verl's loggers: the module it imports, what installs that, and the login it needs with its command."""

    module: str | None = None
    package: str | None = None
    login: Login | None = None
    how: str | None = None


def wandb_login(environment: Mapping[str, str], home: Path) -> bool:
    """A key or identity token, a line for its host in netrc, or a mode without a server."""
    if environment.get("WANDB_MODE", "").lower() in WANDB_AWAY:
        return True
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    files = (Path(environment["NETRC"]),) if environment.get("NETRC") else (home / ".netrc", home / "_netrc")
    return any(_names(file, host) for file in files)


def swanlab_login(environment: Mapping[str, str], home: Path) -> bool:
    """A key, the file that `swanlab login` writes, or a mode without a server."""
    if environment.get("SWANLAB_MODE", "").lower() in SWANLAB_AWAY or environment.get("SWANLAB_API_KEY"):
        return True
    return (Path(environment.get("SWANLAB_SAVE_DIR") or home / ".swanlab") / ".netrc").is_file()


def clearml_login(environment: Mapping[str, str], home: Path) -> bool:
    """Keys, or the file that `clearml-init` writes."""
    keys = ("CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY")
    file = Path(environment.get("CLEARML_CONFIG_FILE") or home / "clearml.conf")
    return all(environment.get(key) for key in keys) or file.is_file()


def vemlp_login(environment: Mapping[str, str], _: Path) -> bool:
    """The three variables that verl reads (verl/utils/tracking.py:150-152)."""
    return all(environment.get(key) for key in VEMLP)


def _names(file: Path, host: str) -> bool:
    """Whether a netrc file has a login for a host."""
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
"""Names that verl 0.9.1 knows (verl/utils/tracking.py:49-60) and what each needs."""


def problems(
    names: Sequence[str], environment: Mapping[str, str], installed: Callable[[str], bool], home: Path
) -> Iterator[Problem]:
    """Yield what keeps each of a run's loggers from starting; `installed` answers for a module's name."""
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
    """Yield those of the names that need more than verl itself."""
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
"""Arguments of `ray.init` that make a Ray of one's own; it refuses most of them on a cluster
(ray/_private/worker.py:1936).
"""
VERL_VARIABLES = frozenset(
    {
        "VERL_FULL_DETERMINISM", "VLLM_BATCH_INVARIANT", "VERL_RL_INSIGHT_ENABLE", "PYTHONHASHSEED",
        "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC", "NCCL_DETERMINISTIC", "NCCL_ALGO",
        "TRANSFER_QUEUE_ENABLE",
    }
)  # fmt: skip
"""Variables that verl hands to its workers itself, from the driver's environment or of its own accord
(verl/trainer/constants_ppo.py:141, verl/trainer/main_ppo.py:69); Ray refuses a job that sets them, too."""
CPUS_A_DEVICE = 3
"""Ray CPUs that verl takes with each GPU, on the GPU's node (verl/single_controller/ray/base.py:146 and 192)."""
LOGGER_ROOT = "VERL_FILE_LOGGER_ROOT"


def on_cluster(resolved: Resolved) -> Resolved:
    """The preset without the keys of verl's that make a Ray of one's own (a CPU preset has some)."""
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
    """Arguments that `ray.init` gets of a preset's keys of verl, however deep they are written; null is none."""
    found: dict[str, Any] = {}
    for key, value in verl.items():
        found.update(_below(RAY_INIT, key.removeprefix("+"), value))
    return {name: value for name, value in found.items() if value is not None}


def worker_variables(verl: Mapping[str, Any]) -> dict[str, str]:
    """Variables that a preset's keys of verl set for Ray's workers alone."""
    found: dict[str, str] = {}
    for key, value in verl.items():
        found.update({name: str(text) for name, text in _below(ENV_VARS, key.removeprefix("+"), value).items()})
    return found


def driver_only(overrides: Iterable[Override]) -> frozenset[str]:
    """Variables that must be in the driver's environment alone: verl hands them on, and Ray refuses to be given them twice."""
    return VERL_VARIABLES.union(*(_below(ENV_VARS, o.key, o.value) for o in overrides))


def _below(parent: str, key: str, value: object) -> dict[str, Any]:
    """What a key and its value set directly below `parent`, which is written as a path of names or as maps."""
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
    """The environment where the attempt's folder is on no cluster node: verl makes folders below a root, not above a file."""
    return {key: value for key, value in env.items() if key != METRICS_PATH} | {LOGGER_ROOT: str(attempt / "node")}

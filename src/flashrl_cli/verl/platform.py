"""Environment variables of a run, by platform."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashrl_cli import contract, cpu, paths
from flashrl_cli.verl.replicas import bf16_replicas

if TYPE_CHECKING:
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.paths import AttemptPaths

DTYPE = "actor_rollout_ref.rollout.dtype"
METRICS_PATH = "VERL_FILE_LOGGER_PATH"

COMMON = {
    "HYDRA_FULL_ERROR": "1",  # Hydra otherwise cuts the traceback that tells why a worker died
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
CPU = {
    "VERL_PLATFORM": "cpu",  # the platform that flashrl's plugin registers
    "VERL_ENGINE_DEVICE": "cuda",  # verl registers its training engines for cuda and npu only; this is its own switch
    "RAY_enable_worker_prestart": "0",  # Ray otherwise starts idle workers for its 16 logical CPUs before anybody asks
    **cpu.ENGINE,
}
MIXED = {
    # vLLM finds compiled models by their configuration, which replicas of two precisions share (vllm/compilation/decorators.py:525);
    # verl switches that off, too, unless the environment says otherwise (verl/trainer/constants_ppo.py:93)
    "VLLM_DISABLE_COMPILE_CACHE": "1",
}
OWNED = frozenset({contract.ENV_PLUGIN_DIR, contract.ENV_PLATFORM, contract.ENV_ROLLOUT, METRICS_PATH})
"""Variables that a preset cannot set: files of the attempt are found by them."""


def environment(spec: RunSpec, attempt: AttemptPaths, *, logging: str | None = None) -> dict[str, str]:
    """What a run adds to the environment: flashrl's, the preset's `env` over it, then the attempt's files.

    `logging` is the plugins' level, which a job of a Ray cluster would not inherit.
    """
    told = {} if logging is None else {contract.ENV_LOGGING: logging}
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
    return dict(sorted((COMMON | platform | told | spec.env | own).items()))


def rollout_options(spec: RunSpec) -> contract.RolloutOptions:
    """What the plugins do to a run's rollout engines beside their precision."""
    rollout = spec.rollout
    profile = None if rollout.profile is None else str(paths.absolute(rollout.profile))
    return contract.RolloutOptions(
        profile=profile,
        bf16_replicas=bf16_replicas(spec),
        lm_head_fp32=rollout.lm_head_fp32,
        bf16_transfer=rollout.precision in contract.METHODS and _engine_is_bf16(spec),
    )


def _engine_is_bf16(spec: RunSpec) -> bool:
    """Whether an engine of a dense model (verl.demands refuses 8-bit experts) casts all its weights to bf16, verl's own default."""
    return spec.verl.get(DTYPE, "bfloat16") in {"bfloat16", "bf16"}

"""What must hold for the verl keys that a preset gives word for word: what compose cannot see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from flashrl_cli import contract
from flashrl_cli.config.resolve import Resolved
from flashrl_cli.errors import Problem
from flashrl_cli.verl import platform
from flashrl_cli.verl.overrides import CORRECTION, ENGINE, ROLLOUT, TABLE, Override
from flashrl_cli.verl.versions import dead_key

Rule = Callable[[Resolved, Sequence[Override]], Iterator[Problem]]

_FIXED = "flashrl drives verl's synchronous V1 trainer with vLLM, and no other"
_APART = {
    "trainer.use_v1": _FIXED,
    "trainer.v1.trainer_mode": _FIXED,
    f"{ROLLOUT}.name": _FIXED,
    "trainer.experiment_name": "--name",
    "trainer.default_local_dir": "--name, and trainer.project",
    "trainer.resume_mode": "--resume",
    "trainer.resume_from_path": "--resume",
    "trainer.device": "--set resources.platform=…",
    f"{ENGINE}.kv_cache_dtype": "--set rollout.kv_cache=fp8",
    f"{ENGINE}.calculate_kv_scales": "drop it: --set rollout.kv_cache=fp8 makes scales at each weight update",
    f"{CORRECTION}.rollout_is": "--tis",
    f"{CORRECTION}.rollout_is_threshold": "--tis",
}
OWNED = {entry.key: f"--set {entry.field}=…" for entry in TABLE} | _APART
"""Keys that flashrl itself gives to verl, and how a person sets them."""


def problems(resolved: Resolved, overrides: Sequence[Override]) -> list[Problem]:
    """Everything wrong with the verbatim keys, without looking at verl's own tree."""
    return [problem for rule in RULES for problem in rule(resolved, overrides)]


def is_forced(key: str) -> bool:
    """Whether a key, less its one `+`, goes around Hydra's check: `++key` takes any misspelling, `~key` deletes."""
    return key.startswith(("+", "~"))


def no_forced_keys(_: Resolved, overrides: Sequence[Override]) -> Iterator[Problem]:
    """A launcher that lets a misspelled key pass has checked nothing."""
    for override in overrides:
        if is_forced(override.key):
            bare = override.key.lstrip("+~")
            message = f"`++` and `~` before a key of verl's are refused: {bare} would not be checked"
            yield Problem(message, override.origin.where, f"verl.{bare}, or verl.+{bare} for a new key")


def no_dead_keys(_: Resolved, overrides: Sequence[Override]) -> Iterator[Problem]:
    """Keys that compose and do nothing."""
    for override in overrides:
        dead = dead_key(override.key)
        if dead:
            yield Problem(
                f"verl does not act on {override.key}: {dead.why}", override.origin.where, f"use {dead.instead}"
            )


def no_owned_keys(resolved: Resolved, overrides: Sequence[Override]) -> Iterator[Problem]:
    """One way to say a thing: a key that flashrl emits, or has a typed field for, is not given word for word."""
    counts = Counter(override.key for override in overrides)
    for override in verbatim(resolved, overrides):
        if override.key in OWNED:
            yield Problem(f"flashrl sets verl's {override.key} itself", override.origin.where, OWNED[override.key])
        elif counts[override.key] > 1:
            yield Problem(
                f"{override.key} is set twice", override.origin.where, "drop it, or the option that sets it too"
            )


def one_quantization(resolved: Resolved, overrides: Sequence[Override]) -> Iterator[Problem]:
    """The rollout's precision has one switch; verl's own would fight flashrl's engine arguments or go unproven."""
    for override in verbatim(resolved, overrides):
        if override.key == f"{ENGINE}.quantization" or (
            override.key == f"{ROLLOUT}.quantization"
            and (resolved.spec.rollout.precision in contract.METHODS or override.value == "fp8")
        ):
            yield Problem(
                f"{override.key} and rollout.precision = {resolved.spec.rollout.precision} say it twice",
                override.origin.where,
                "--rollout bf16|int8|fp8|fp8-block alone",
            )


def no_bypass_with_correction(resolved: Resolved, overrides: Sequence[Override]) -> Iterator[Problem]:
    """V1 drops the correction in bypass mode without a word (verl/trainer/ppo/v1/trainer_base.py:1640)."""
    for override in verbatim(resolved, overrides):
        if override.key == f"{CORRECTION}.bypass_mode" and override.value and resolved.spec.correction.cap is not None:
            yield Problem(
                "bypass_mode with truncated importance sampling: verl would silently not correct",
                override.origin.where,
                "drop bypass_mode, or --tis off",
            )


def own_environment(resolved: Resolved, _: Sequence[Override]) -> Iterator[Problem]:
    """The files of an attempt and the proof of the precision depend on these variables."""
    for name in sorted(platform.OWNED & resolved.spec.env.keys()):
        yield Problem(f"{name} is flashrl's own", resolved.origins[f"env.{name}"].where, "drop it")


def no_idle_options(resolved: Resolved, _: Sequence[Override]) -> Iterator[Problem]:
    """An option given for this very run is read by someone. Presets may hold values for switches that they leave off."""
    algorithm = resolved.spec.algorithm
    readers = {
        "algorithm.kl_loss_coef": (algorithm.kl_loss, "algorithm.kl_loss=true"),
        "algorithm.kl_in_reward_coef": (algorithm.kl_in_reward, "algorithm.kl_in_reward=true"),
        "algorithm.normalize_by_std": (algorithm.advantage == "grpo", "algorithm.advantage=grpo"),
        "algorithm.filter_groups.": (algorithm.filter_groups.enable, "algorithm.filter_groups.enable=true"),
        "critic.": (algorithm.advantage == "gae", "algorithm.advantage=gae"),
    }
    for field, origin in resolved.origins.items():
        if origin.layer != "set" or field == "algorithm.filter_groups.enable":
            continue
        for start, (read, switch) in readers.items():
            if field.startswith(start) and not read and _says_something(resolved.value(field)):
                yield Problem(f"nothing reads {field} without {switch}", origin.where, f"--set {switch}, or drop it")


def _says_something(value: object) -> bool:
    """Whether it is more than nothing: weights of 0 are how a script switches a term off."""
    return value is False or value not in (0, None)


def verbatim(resolved: Resolved, overrides: Sequence[Override]) -> Iterator[Override]:
    """The overrides that come from the spec's `verl` map; they stand last."""
    yield from overrides[len(overrides) - len(resolved.spec.verl) :]


RULES: tuple[Rule, ...] = (
    no_forced_keys,
    no_dead_keys,
    no_owned_keys,
    one_quantization,
    no_bypass_with_correction,
    own_environment,
    no_idle_options,
)

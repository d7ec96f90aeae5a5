"""A mistake that a demand of verl's finds, and the settings that hold it."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashrl_cli.verl import compose
from flashrl_cli.verl.config import Settings
from flashrl_cli.verl.overrides import Places, overrides
from flashrl_cli.weights.shape import ModelShape
from tests.specs import load_spec

PLACES = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))
A, R, REF, M = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "ref", "model"))
ENGINE = f"{R}.engine_kwargs.vllm"
BACKEND = f"verl.{R}.checkpoint_engine.backend="
SEPARATE = ("trainer.mode=separate_async", "correction.cap=2")
CORRECTION = "algorithm.rollout_correction"
SHAPE = ModelShape(
    architecture="qwen2",
    layers=2,
    hidden=1792,
    heads=28,
    kv_heads=4,
    head_dim=64,
    intermediate=4096,
    vocab=512,
    tied=True,
    max_positions=32768,
)
MIXTURE = replace(SHAPE, experts=8, experts_per_token=2, expert_intermediate=256)


@functools.cache
def verls_own() -> Any:
    return compose.tree([f"{R}.name=vllm"])._config


def settings(preset: str, sets: tuple[str, ...] = (), rollout: str | None = None, shape: ModelShape | None = None):
    """As after a composition, which takes 0.4 s: the overrides are put into a copy of verl's own tree."""
    from omegaconf import OmegaConf

    resolved = load_spec(preset, rollout=rollout, sets=sets)
    given = overrides(resolved, PLACES)
    tree = copy.deepcopy(verls_own())
    for override in given:
        OmegaConf.update(tree, override.key, override.value, merge=False, force_add=True)
    return Settings(resolved, given, compose.Tree(tree), shape)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A mistake, what is said of it, and the nearest thing that is none."""

    rule: str
    preset: str = "gsm8k-0.5b"
    sets: tuple[str, ...]
    says: str
    hint: str
    where: str | None = None
    legal: tuple[str, ...] = ()
    rollout: str | None = None
    shape: ModelShape | None = None
    legal_shape: ModelShape | None = None


def case(rule: str, *sets: str, says: str, hint: str, legal: tuple[str, ...] = (), **more: Any) -> Case:
    return Case(rule=rule, sets=sets, says=says, hint=hint, legal=legal, **more)

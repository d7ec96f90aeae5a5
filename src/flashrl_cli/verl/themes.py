"""verl's keys by what they are about, for people who read a list of overrides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashrl_cli.verl.overrides import ACTOR, CORRECTION, ROLLOUT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flashrl_cli.verl.overrides import Override

THEMES: Mapping[str, tuple[str, ...]] = {
    "data": ("data",),
    "model": ("actor_rollout_ref.model", "actor_rollout_ref.model_engine", "model_engine"),
    "importance sampling": (
        CORRECTION,
        f"{ACTOR}.policy_loss",
        f"{ROLLOUT}.calculate_log_probs",
        f"{ROLLOUT}.logprobs_mode",
    ),
    "algorithm": ("algorithm",),
    "policy": (ACTOR, "actor_rollout_ref.ref"),
    "critic": ("critic",),
    "rollout": (ROLLOUT,),
    "reward": ("reward",),
    "trainer": ("trainer",),
}
"""Starts of keys, by theme in the order of reading; the first theme that covers a key has it."""
OTHER = "machine"


def by_theme(overrides: Iterable[Override]) -> dict[str, list[Override]]:
    """The overrides by theme, in the order of `THEMES` and, within one, of the list; no empty themes."""
    groups: dict[str, list[Override]] = {theme: [] for theme in (*THEMES, OTHER)}
    for override in overrides:
        groups[_theme(override.key)].append(override)
    return {theme: group for theme, group in groups.items() if group}


def _theme(key: str) -> str:
    return next((theme for theme, starts in THEMES.items() if any(_covers(start, key) for start in starts)), OTHER)


def _covers(start: str, key: str) -> bool:
    return key == start or key.startswith(f"{start}.")

"""Presets against the original recipes' override lists (composed for verl 0.9.1), with the differences spelled out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.verl.overrides import Places, overrides
from tests.specs import decided_spec

FOLDER = Path(__file__).parent / "original"
CAPS = {"gsm8k-0.5b": "2", "dapo-32b": "8"}
ATTENTION = "model.override_config.attn_implementation"
EXTENSION = "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls"
PLACES = {
    "data.train_files",
    "data.val_files",
    "actor_rollout_ref.model.path",
    "trainer.experiment_name",
    "trainer.default_local_dir",
    EXTENSION,
}
"""Paths, the run's name, and where flashrl's own class lies."""
ALWAYS = {
    EXTENSION,
    f"actor_rollout_ref.{ATTENTION}",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.stream_interval",
    "trainer.v1.sampler.custom_sampler.path",
    "trainer.v1.sampler.custom_sampler.name",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
    "ray_kwargs.ray_init.include_dashboard",
}
ADDED = {
    "gsm8k-0.5b": {"trainer.default_local_dir", "trainer.resume_mode", f"critic.{ATTENTION}", *ALWAYS},
    "dapo-32b": ALWAYS,
}
"""What flashrl always says and a list leaves to verl: absolute checkpoints, to go on after an interruption, that weight
updates are checked, the attention, that a rollout exchanges fewer messages and is looked after more often, and that Ray
starts no dashboard.
"""
PASSES = {
    "gsm8k-0.5b": {
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
        "critic.ppo_micro_batch_size_per_gpu",
        "actor_rollout_ref.model.use_remove_padding",
        "critic.model.use_remove_padding",
    },
    "dapo-32b": set[str](),
}
"""Keys of a list that cut a mini-batch into passes by responses, which is no part of the algorithm: verl 0.9.1 divides
by the tokens of the mini-batch, however it is cut.
"""
CUT_BY_TOKENS = {
    "actor_rollout_ref.actor.use_dynamic_bsz",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
    "actor_rollout_ref.model.enable_gradient_checkpointing",
}
"""What flashrl says instead; docs/recipes.md has the values, which test_recipes.py compares."""
CRITIC_BY_TOKENS = {
    "critic.use_dynamic_bsz",
    "critic.ppo_infer_max_token_len_per_gpu",
    "critic.model.enable_gradient_checkpointing",
}
OURS = {"fp8": "fp8-block"}
"""The lists' precisions under flashrl's names: verl's `quantization=fp8` has a scale for each block."""

Items = dict[str, tuple[bool, Any]]


def parsed(lines: list[str]) -> Items:
    """Key to (is it added with a plus, value as Hydra reads it)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    # `~` stands for the home folder in the lists, where a shell expands it
    found = OverridesParser.create().parse_overrides([line.replace("=~", "=/home") for line in lines])
    return {o.key_or_group: (o.is_add(), o.value()) for o in found}


def original(preset: str, precision: str, cap: str | None) -> Items:
    """The list in original/; one that is missing is put together, as precision and cap change different keys."""
    suffix = f".tis{cap}" if cap else ""
    file = FOLDER / f"{preset}.{precision}{suffix}.txt"
    if file.is_file():
        return parsed(file.read_text(encoding="utf-8").splitlines())
    capped, plain = original(preset, precision, CAPS[preset]), original(preset, "bf16", CAPS[preset])
    assert cap is None
    return original(preset, "bf16", None) | {key: capped[key] for key in capped if key not in plain}


def ours(preset: str, precision: str, cap: str | None) -> Items:
    resolved = decided_spec(preset, rollout=OURS.get(precision, precision), tis=cap or "off")
    places = Places(name="run", data=Path("/data"), checkpoints=Path("/checkpoints/run"))
    texts = [str(override) for override in overrides(resolved, places)]
    items = parsed(texts)
    assert len(items) == len(texts), "a key is given twice"
    return items


COMBINATIONS = [
    (preset, precision, cap)
    for preset, highest in CAPS.items()
    for precision in ("bf16", "int8", "fp8")
    for cap in (None, highest)
]


@pytest.mark.parametrize(("preset", "precision", "cap"), COMBINATIONS)
def test_values_are_the_originals(preset: str, precision: str, cap: str | None) -> None:
    expected, found = original(preset, precision, cap), ours(preset, precision, cap)
    cut = CUT_BY_TOKENS | (CRITIC_BY_TOKENS if preset == "gsm8k-0.5b" else set())
    assert found.keys() == (expected.keys() - PASSES[preset]) | ADDED[preset] | cut
    compared = expected.keys() - PLACES - PASSES[preset] - cut
    assert {key: found[key] for key in compared} == {key: expected[key] for key in compared}


def test_all_lists_are_used() -> None:
    """Eleven: nine of training, and two of evaluation, whose replacements test_recipes.py compares."""
    files = {file.name for file in FOLDER.iterdir()}
    names = {f"{preset}.{precision}{f'.tis{cap}' if cap else ''}.txt" for preset, precision, cap in COMBINATIONS}
    assert len(files & names) == 9
    assert files - names == {"eval.generation.txt", "eval.score.txt"}


@pytest.mark.parametrize(("preset", "precision", "count"), [("dapo-32b", "bf16", 80), ("gsm8k-0.5b", "int8", 54)])
def test_lists_have_the_length_that_the_reference_states(preset: str, precision: str, count: int) -> None:
    assert len(original(preset, precision, CAPS[preset])) == count

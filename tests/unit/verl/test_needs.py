"""flash-attn and disk that a run of verl needs."""

from __future__ import annotations

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.verl import environment

PARALLEL = "verl.actor_rollout_ref.actor.ulysses_sequence_parallel_size"


def spec(preset: str, *sets: str) -> RunSpec:
    return load_spec(preset, sets=sets).spec


def test_verl_s_default_needs_flash_attention() -> None:
    found = spec("dapo-32b", f"{PARALLEL}=1")
    assert environment.needs_flash(found)
    assert not environment.cannot_do_without_flash(found)


def test_the_options_that_are_offered_do_without_it() -> None:
    words = environment.WITHOUT_FLASH.split()
    sets = [word for word in words if word != "--set"]
    assert words.count("--set") == len(sets) == 2
    assert not environment.needs_flash(spec("dapo-32b", f"{PARALLEL}=1", *sets))


@pytest.mark.parametrize(("preset", "sets"), [("gsm8k-0.5b", []), ("dapo-32b", [f"{PARALLEL}=8"])])
def test_critics_and_sequence_parallelism_need_it_anyway(preset: str, sets: list[str]) -> None:
    found = spec(preset, "verl.+actor_rollout_ref.model.override_config.attn_implementation=sdpa", *sets)
    assert environment.cannot_do_without_flash(found)
    assert environment.needs_flash(found)


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

from __future__ import annotations

from dataclasses import replace

from flashrl_cli.memory.estimate import block, of_settings, summary
from flashrl_cli.memory.parts import GIB
from flashrl_cli.verl.config import Batch, TrainerSettings
from flashrl_cli.weights.shape import ModelShape


def test_summaries(settings: TrainerSettings, shape: ModelShape) -> None:
    fits = summary(of_settings(settings, shape, None, 80 * GIB))
    assert fits[0].startswith("✓ fits: ")
    assert "of 80.0 GiB a GPU" in fits[0]
    assert len(fits) == 2
    over = summary(of_settings(settings, shape, None, 16 * GIB))
    assert over[0].startswith("✗ over: ")
    assert "vLLM would not start" in over[2]
    assert over[3].startswith("most would help: --set ")


def test_a_block_for_comments(settings: TrainerSettings, shape: ModelShape) -> None:
    lines = block(of_settings(settings, shape, None, 80 * GIB))
    assert lines[0].startswith("✓ fits: ")
    assert [line.split("  ")[1] for line in lines[1:5]] == ["rollout", "log-probs", "actor update", "weight update"]
    assert lines[1].count(",") == 2
    assert lines[5].startswith("KV cache of an engine: ")


def test_the_longest_block(settings: TrainerSettings, shape: ModelShape) -> None:
    budget = Batch(tokens=262144)
    actor = replace(settings.actor, train=budget, infer=budget, remove_padding=False, checkpointing=False)
    run = replace(settings, actor=actor, critic=replace(actor, strategy="fsdp2"))
    lines = block(of_settings(run, shape, None, 8 * GIB))
    assert len(lines) == 9
    assert max(map(len, lines)) <= 110
    assert " without padding) of 8.0 GiB a GPU" in lines[0]

"""The estimate of a run: its phases, the verdict, the advice, and how they are shown."""

from __future__ import annotations

import cProfile
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from flashrl_cli.memory import advise, parts
from flashrl_cli.memory.estimate import block, document, judge, of_settings, possible, summary
from flashrl_cli.text import GIB
from flashrl_cli.verl.config import Batch, EngineSettings, TrainerSettings
from flashrl_cli.weights.shape import ModelShape


def bytes_of(settings: TrainerSettings, shape: ModelShape, gpu: int = 80) -> dict[str, int]:
    return {phase.name: phase.bytes for phase in of_settings(settings, shape, None, gpu * GIB).phases}


def names_in(settings: TrainerSettings, shape: ModelShape, phase: str) -> set[str]:
    found = of_settings(settings, shape, None, 80 * GIB).phases
    return {part.name for entry in found if entry.name == phase for part in entry.items}


def test_a_7b_on_eight_large_gpus_fits(settings: TrainerSettings, shape: ModelShape) -> None:
    found = of_settings(settings, shape, None, 80 * GIB)
    assert (found.verdict, found.advice, found.starts) == ("fits", None, True)
    assert [phase.name for phase in found.phases] == ["rollout", "log-probs", "actor update", "weight update"]


def test_the_trainer_s_idle_states_lie_beside_the_engine(settings: TrainerSettings, shape: ModelShape) -> None:
    offloaded = replace(settings, actor=replace(settings.actor, param_offload=True, optimizer_offload=True))
    before, after = bytes_of(settings, shape), bytes_of(offloaded, shape)
    assert before["rollout"] - after["rollout"] == pytest.approx(12 * 7.6156e9 / 8, rel=0.001)
    assert before["actor update"] == after["actor update"]  # verl loads all of it to train


def test_phases_of_a_critic(settings: TrainerSettings, shape: ModelShape, engine: EngineSettings) -> None:
    critic = replace(engine, train=Batch(tokens=8192), infer=Batch(tokens=8192), checkpointing=False)
    with_critic = replace(settings, critic=critic)
    assert bytes_of(with_critic, shape)["critic update"] > bytes_of(with_critic, shape)["actor update"]
    assert {"critic parameters", "critic Adam"} <= names_in(with_critic, shape, "rollout")
    small = replace(shape, layers=2)
    own = of_settings(with_critic, shape, small, 80 * GIB).phases
    same = of_settings(with_critic, shape, None, 80 * GIB).phases
    assert own[2].bytes < same[2].bytes


def test_engine_asleep_awake_or_elsewhere(settings: TrainerSettings, shape: ModelShape) -> None:
    awake = replace(settings, rollout=replace(settings.rollout, sleeps=False))
    apart = replace(settings, rollout_gpus=4)
    assert "sleeping engine" in names_in(settings, shape, "actor update")
    assert "KV cache" in names_in(awake, shape, "actor update")
    assert not names_in(apart, shape, "actor update") & {"KV cache", "sleeping engine"}
    assert "actor parameters" not in names_in(apart, shape, "rollout")


def test_engines_on_gpus_of_their_own(settings: TrainerSettings, shape: ModelShape) -> None:
    apart = replace(settings, rollout_gpus=4, train_batch=64, mini_batch=32)
    found = of_settings(apart, shape, None, 80 * GIB)
    assert [(phase.side, phase.name) for phase in found.phases] == [
        ("rollout", "rollout"),
        ("rollout", "refit"),
        ("trainer", "log-probs"),
        ("trainer", "actor update"),
        ("trainer", "weight update"),
    ]
    # two of the checkpoint engine on both sides, and two more between the receiver and the engine
    item_bytes = {(phase.name, part.name): part.bytes for phase in found.phases for part in phase.items}
    assert item_bytes["weight update", "checkpoint engine"] == item_bytes["refit", "checkpoint engine"] == 2 * (2 << 30)
    assert item_bytes["refit", "buckets"] == (2 << 30) + 152_064 * 3584 * 4
    assert "KV cache" not in names_in(apart, shape, "refit")
    awake = replace(apart, rollout=replace(apart.rollout, sleeps=False))
    assert {"KV cache", "checkpoint engine"} <= names_in(awake, shape, "refit")
    # the policy at the step's start, and a newer one beside it
    assert found.host == pytest.approx(2 * 4 * 7.6156e9 / 8, rel=0.001)
    assert of_settings(replace(apart, mini_batch=64), shape, None, 80 * GIB).host == found.host
    assert of_settings(settings, shape, None, 80 * GIB).host == 0
    lines = block(found)
    assert lines[1] == "  rollout, 4 GPUs:"
    assert lines[4] == "  trainer, 8 GPUs:"
    assert f"most in {found.peak.name} ({found.peak.side} GPUs)" in lines[0]
    assert any(line.startswith("CPU memory of a trainer process") for line in lines)
    assert document(found)["gpus"] == {"rollout": 4, "trainer": 8}


def test_batches_of_engines_on_gpus_of_their_own(settings: TrainerSettings, shape: ModelShape) -> None:
    """A trainer apart takes a mini-batch at a time; engines hold what is sampled ahead, too."""
    apart = replace(settings, rollout_gpus=4, rollout=replace(settings.rollout, max_num_seqs=1024))
    together = replace(settings, actor=replace(settings.actor, infer=Batch(sequences=64)))
    logits = "log-probs"
    assert bytes_of(replace(together, rollout_gpus=4), shape)[logits] < bytes_of(together, shape)[logits]
    ahead = replace(apart, prefetch=0.5)
    assert of_settings(apart, shape, None, 80 * GIB).wanted_tokens == 128 * 8 // 4 * 4096
    assert of_settings(ahead, shape, None, 80 * GIB).wanted_tokens == 192 * 8 // 4 * 4096
    assert not possible(replace(apart, rollout=replace(apart.rollout, tensor_parallel=4), rollout_gpus=6), shape)


def test_fsdp1_exports_a_copy_of_its_shards(settings: TrainerSettings, shape: ModelShape) -> None:
    second = replace(settings, actor=replace(settings.actor, strategy="fsdp2"))
    assert "exported shards" in names_in(settings, shape, "weight update")
    assert "exported shards" not in names_in(second, shape, "weight update")


def test_a_reference_takes_a_pass_of_its_own(settings: TrainerSettings, shape: ModelShape) -> None:
    large = replace(settings, reference=Batch(sequences=16))
    assert bytes_of(large, shape)["log-probs"] > bytes_of(settings, shape)["log-probs"]


@pytest.mark.parametrize(
    ("gpu", "changes", "share", "key"),
    [
        (64, {"checkpointing": False}, 0.5, "model.recompute"),
        (80, {}, 0.9, "optimizer_offload"),
        (80, {"optimizer_offload": True, "param_offload": True}, 0.98, "utilization"),
        (48, {"optimizer_offload": True, "param_offload": True, "fused_kernels": True}, 0.3, "utilization"),
    ],
)
def test_advice_makes_it_fit(
    gpu: int,
    changes: dict[str, bool],
    share: float,
    key: str,
    settings: TrainerSettings,
    shape: ModelShape,
) -> None:
    actor = replace(settings.actor, **changes)  # type: ignore[arg-type]
    run = replace(settings, actor=actor, rollout=replace(settings.rollout, gpu_memory_utilization=share))
    found = of_settings(run, shape, None, gpu * GIB)
    assert found.verdict in {"tight", "over"}
    assert found.advice is not None
    assert found.advice.fits
    assert key in found.advice.key


def test_the_most_helpful_key_where_none_is_enough(settings: TrainerSettings, shape: ModelShape) -> None:
    found = of_settings(settings, shape, None, 16 * GIB)
    assert found.verdict == "over"
    assert not found.starts
    assert found.advice is not None
    assert not found.advice.fits
    assert str(found.advice).startswith(f"--set {found.advice.key}=")


def test_an_engine_that_cannot_hold_a_sequence_is_over(settings: TrainerSettings, shape: ModelShape) -> None:
    long = replace(settings, rollout=replace(settings.rollout, max_model_len=2_000_000))
    assert of_settings(long, shape, None, 80 * GIB).verdict == "over"


def test_the_document_is_plain_and_adds_up(settings: TrainerSettings, shape: ModelShape) -> None:
    found = of_settings(settings, shape, None, 24 * GIB)
    plain = json.loads(json.dumps(document(found)))
    assert plain["verdict"] == "over"
    assert plain["peak"]["bytes"] == max(phase["bytes"] for phase in plain["phases"])
    assert plain["peak"]["bytes_without_padding"] == plain["peak"]["bytes"]
    for phase in plain["phases"]:
        assert phase["bytes"] == sum(item["bytes"] for item in phase["items"])
    assert plain["kv_cache"]["wanted_tokens"] == 128 * 4096
    assert set(plain["advice"]) == {"key", "value", "fits"}


def test_padding_alone_is_tight_not_over(settings: TrainerSettings, shape: ModelShape) -> None:
    budget = Batch(tokens=16384)
    packed = replace(settings, actor=replace(settings.actor, train=budget, infer=budget))
    padded = replace(packed, actor=replace(packed.actor, remove_padding=False))
    before, after = (of_settings(run, shape, None, 80 * GIB) for run in (packed, padded))
    assert (before.verdict, after.verdict) == ("fits", "tight")
    assert before.least == before.peak.bytes
    assert after.least < 80 * GIB < after.peak.bytes
    assert str(after.advice) == "--set model.packing=true"
    sdpa = replace(padded, actor=replace(padded.actor, flash_attention=False, packable=False))
    assert of_settings(sdpa, shape, None, 80 * GIB).verdict == "fits", "log-probs and entropies in chunks"
    smaller = of_settings(sdpa, shape, None, 56 * GIB)
    assert smaller.verdict == "tight"
    assert str(smaller.advice) == "--set verl.actor_rollout_ref.model.use_fused_kernels=true"


def test_margins_alone_are_tight(settings: TrainerSettings, shape: ModelShape) -> None:
    found = of_settings(settings, shape, None, 80 * GIB)
    held, worst = found.peak.bytes, math.ceil(max(phase.at_worst for phase in found.phases))
    starting = parts.engine(shape, settings, 80 * GIB)
    assert [judge(starting, found.phases, found.least, size) for size in (worst, worst - 1, held, held - 1)] == [
        "fits",
        "tight",
        "tight",
        "over",
    ]


def test_a_bucket_of_the_weight_update_holds_the_largest_tensor(settings: TrainerSettings, shape: ModelShape) -> None:
    phases = of_settings(replace(settings, bucket=1 << 20), shape, None, 80 * GIB).phases
    sizes = {part.name: part.bytes for part in phases[-1].items}
    assert sizes["buckets"] == sizes["full tensor"] + (1 << 20) > 1 << 30


def test_budgets_of_update_and_log_probs_are_advised_apart(settings: TrainerSettings) -> None:
    actor = replace(settings.actor, train=Batch(tokens=16384), infer=Batch(tokens=65536))

    def after(name: str, value: int, *, follow: bool) -> EngineSettings:
        run = replace(settings, actor=actor, log_probs_follow=follow)
        return next(changed.actor for key, new, changed in advise.candidates(run) if (key, new) == (name, value))

    assert after("log_prob_tokens", 32768, follow=False) == replace(actor, infer=Batch(tokens=32768))
    assert after("token_budget", 8192, follow=False) == replace(actor, train=Batch(tokens=8192))
    assert after("token_budget", 8192, follow=True) == replace(
        actor, train=Batch(tokens=8192), infer=Batch(tokens=8192)
    )


def test_it_takes_few_calls(settings: TrainerSettings, shape: ModelShape) -> None:
    """A formula and no search: calls are counted, because seconds are the machine's."""
    with cProfile.Profile() as profile:
        of_settings(settings, shape, None, 24 * GIB)
    assert sum(entry.callcount for entry in profile.getstats()) < 50_000


def test_advice_is_possible(settings: TrainerSettings, shape: ModelShape) -> None:
    assert possible(settings, shape)
    assert not possible(replace(settings, rollout=replace(settings.rollout, tensor_parallel=8)), shape)
    assert not possible(replace(settings, mini_batch=3, n=1), shape)


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


def spared(settings: TrainerSettings, shape: ModelShape, gpu: int = 80) -> advise.Spare:
    return of_settings(settings, shape, None, gpu * GIB).spare


def test_free_memory_is_spent_on_what_costs_time(settings: TrainerSettings, shape: ModelShape) -> None:
    short = replace(settings, prompt=128, response=384, rollout=replace(settings.rollout, max_model_len=512))
    assert spared(short, shape).recompute
    assert spared(short, shape, 40) == advise.Spare(), "what does not fit has advice of another kind"
    stored = replace(short, actor=replace(short.actor, checkpointing=False))
    assert not spared(stored, shape).recompute
    assert of_settings(stored, shape, None, 80 * GIB).verdict == "fits", "as the estimate promised"


def test_small_passes_are_named_where_larger_ones_fit(settings: TrainerSettings, shape: ModelShape) -> None:
    short = replace(settings, prompt=64, response=64, rollout=replace(settings.rollout, max_model_len=128))
    found = spared(short, shape).passes
    assert found is not None
    assert (found.count, found.tokens) == (16, 128), "32 sequences a GPU, two a pass, half as long as the longest"
    assert spared(replace(short, mini_batch=8), shape).passes is None, "four passes are few"
    assert spared(settings, shape).passes is None, "two sequences of 4,096 tokens fill it"


def test_only_offload_that_costs_time_is_worth_a_word(settings: TrainerSettings, shape: ModelShape) -> None:
    away = replace(settings.actor, param_offload=True, optimizer_offload=True)
    busy = replace(settings, actor=away, train_batch=1024)
    idle = replace(settings, actor=away, train_batch=8, mini_batch=8)
    assert spared(busy, shape).offloads == (), "seconds of copies in minutes of arithmetic"
    assert spared(idle, shape).offloads == ("param_offload", "optimizer_offload")
    critic = replace(settings.actor, optimizer_offload=True)
    assert spared(replace(idle, actor=settings.actor, critic=critic), shape).critic_offloads == ("optimizer_offload",)


def test_what_is_spared_fits_together(settings: TrainerSettings, shape: ModelShape) -> None:
    away = replace(settings.actor, param_offload=True, optimizer_offload=True)
    for gpu in (40, 48, 64, 80):
        asked = replace(settings, actor=away, train_batch=8, mini_batch=8)
        found = spared(asked, shape, gpu)
        changes: dict[str, Any] = dict.fromkeys(found.offloads, False)
        changes |= {"checkpointing": False} if found.recompute else {}
        rollout = replace(asked.rollout, gpu_memory_utilization=found.engine_share or 0.5)
        together = replace(asked, actor=replace(asked.actor, **changes), rollout=rollout)
        if found != advise.Spare():
            assert of_settings(together, shape, None, gpu * GIB).verdict == "fits"

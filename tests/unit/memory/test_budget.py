"""What `auto` stands for: passes that fit by the estimate and are as long as they can be, and no needless work."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from flashrl_cli.memory import advise, budget
from flashrl_cli.memory.budget import CAP, CRITIC, LOG_PROBS, RECOMPUTE, STEP, UPDATE, Gpu, Search
from flashrl_cli.text import GIB
from flashrl_cli.verl.config import Batch, TrainerSettings
from flashrl_cli.weights.shape import ModelShape
from tests.specs import load_spec

POLICY = (RECOMPUTE, UPDATE, LOG_PROBS)


def gpu(gib: float) -> Gpu:
    return Gpu(round(gib * GIB), "a test's")


def chosen(
    settings: TrainerSettings, shape: ModelShape, gib: float, keys: tuple[str, ...] = POLICY
) -> dict[str, budget.Choice]:
    return budget.estimated(settings, keys, shape, None, gpu(gib))


def share(settings: TrainerSettings) -> int:
    return math.ceil(settings.length / settings.actor.sequence_parallel)


def with_critic(settings: TrainerSettings) -> TrainerSettings:
    return replace(settings, critic=replace(settings.actor, train=Batch(tokens=1), infer=Batch(tokens=1)))


def number(found: Any) -> int:
    """The value of a choice, which is a number of tokens."""
    assert isinstance(found.value, int)
    return found.value


@pytest.mark.parametrize("recompute", [False, True])
def test_passes_grow_with_the_memory_from_one_sequence_to_the_cap(
    settings: TrainerSettings, shape: ModelShape, recompute: bool
) -> None:
    run = advise.recomputing(settings, recompute)
    tokens = [number(chosen(run, shape, gib, (UPDATE,))[UPDATE]) for gib in range(8, 400, 7)]
    assert tokens == sorted(tokens)
    assert (tokens[0], tokens[-1]) == (share(settings), CAP)
    assert len(set(tokens)) > 3


@examples(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gib=st.floats(8, 200), response=st.integers(64, 40_000), parallel=st.sampled_from([1, 2, 4]))
def test_a_budget_fits_and_a_larger_one_would_not(
    gib: float, response: int, parallel: int, settings: TrainerSettings, shape: ModelShape
) -> None:
    run = replace(settings, response=response, actor=replace(settings.actor, sequence_parallel=parallel))
    search = Search(shape, None, gpu(gib))
    for size, apply, phase in (
        (search.update(run), advise.updating, "actor update"),
        (search.log_probs(run), budget.scoring, "log-probs"),
    ):
        assert size.tokens >= share(run)
        assert size.tokens % STEP == 0 or size.tokens == share(run)
        assert size.fits == search.fits(apply(run, size.tokens), phase)
        longer = (size.tokens // STEP + 1) * STEP
        if size.fits and longer <= CAP and "no more" not in size.reason:
            assert not search.fits(apply(run, longer), phase)


def test_a_batch_smaller_than_the_cap_bounds_a_pass(settings: TrainerSettings, shape: ModelShape) -> None:
    small = replace(settings, mini_batch=8, n=1, train_batch=16, prompt=512, response=512)
    found = chosen(small, shape, 400)
    assert (found[UPDATE].value, found[LOG_PROBS].value) == (1024, 2048)
    assert "no more" in found[UPDATE].reason


def test_recomputation_only_where_long_passes_do_not_fit_without(settings: TrainerSettings, shape: ModelShape) -> None:
    search = Search(shape, None, gpu(80))
    enough = search.enough(settings, shape)
    for gib in range(16, 300, 9):
        found = chosen(settings, shape, gib)
        without = Search(shape, None, gpu(gib)).update(advise.recomputing(settings, False))
        assert found[RECOMPUTE].value == (not without.fits or without.tokens < enough)
        with_it = Search(shape, None, gpu(gib)).update(advise.recomputing(settings, bool(found[RECOMPUTE].value)))
        assert found[UPDATE].value == with_it.tokens
    assert {chosen(settings, shape, gib)[RECOMPUTE].value for gib in (24, 300)} == {True, False}


def test_passes_are_long_enough_by_their_work_and_between_nodes(settings: TrainerSettings, shape: ModelShape) -> None:
    search = Search(shape, None, gpu(80))
    thin = replace(shape, layers=2)
    far = replace(settings, nodes=2)
    assert search.enough(settings, shape) == budget.LEAST_ENOUGH  # 7 B parameters
    assert budget.LEAST_ENOUGH < search.enough(settings, thin) <= budget.ENOUGH
    assert search.enough(far, shape) == budget.ENOUGH


def test_given_passes_decide_about_recomputation(settings: TrainerSettings, shape: ModelShape) -> None:
    rows = replace(settings, actor=replace(settings.actor, train=Batch(sequences=4)))
    large, small = (chosen(rows, shape, gib, (RECOMPUTE,))[RECOMPUTE] for gib in (300, 30))
    assert (large.value, small.value) == (False, True)
    assert "the policy's update does not fit 30.0 GiB (a test's)" in small.reason


def test_an_engine_that_does_not_sleep_leaves_less(settings: TrainerSettings, shape: ModelShape) -> None:
    awake = replace(settings, rollout=replace(settings.rollout, sleeps=False))
    asleep, beside = (number(chosen(run, shape, 80, (UPDATE,))[UPDATE]) for run in (settings, awake))
    assert beside < asleep


def test_a_critic_gets_what_its_own_phases_leave(settings: TrainerSettings, shape: ModelShape) -> None:
    both = advise.recomputing(with_critic(settings), True)
    keys = (UPDATE, LOG_PROBS, CRITIC)
    tokens = [number(chosen(both, shape, gib, keys)[CRITIC]) for gib in range(30, 400, 20)]
    assert tokens == sorted(tokens)
    assert (tokens[0], tokens[-1]) == (settings.length, CAP)
    search = Search(shape, None, gpu(120))
    run = budget.scoring(both, share(both))
    size = search.critic(run)
    assert search.fits(budget.valuing(run, size.tokens), "critic update", "log-probs")


def test_a_reference_takes_the_passes_of_log_probs(settings: TrainerSettings, shape: ModelShape) -> None:
    tokens = Batch(tokens=9)
    assert budget.scoring(replace(settings, reference=tokens), 7).reference == Batch(tokens=7)
    assert budget.scoring(settings, 7).reference is None


def test_what_is_undecided_and_the_origin_of_a_decision() -> None:
    plain, rows = load_spec("gsm8k-0.5b"), load_spec("dapo-32b", sets=["algorithm.micro_batch_size_per_gpu=2"])
    assert budget.undecided(plain.spec) == [RECOMPUTE, UPDATE, LOG_PROBS, CRITIC]
    assert budget.undecided(load_spec("dapo-32b").spec) == [RECOMPUTE, UPDATE, LOG_PROBS]
    assert budget.undecided(rows.spec) == [RECOMPUTE]
    decided = budget.decided(plain, {UPDATE: budget.Choice(4096, "because")})
    assert decided.value(UPDATE) == 4096
    assert str(decided.origins[UPDATE]) == "derived: because"
    assert budget.lines(decided) == ["algorithm.max_tokens_per_gpu=4096: because"]
    assert budget.undecided(decided.spec) == [RECOMPUTE, LOG_PROBS, CRITIC]


def test_without_an_estimate_passes_are_short_and_hold_a_sequence() -> None:
    short, long = (budget.without_estimate(load_spec(name).spec, "nobody knows it") for name in ("tiny", "dapo-7b"))
    assert (short[UPDATE].value, short[RECOMPUTE].value) == (4096, True)
    assert "as nobody knows it" in short[UPDATE].reason
    assert long[UPDATE].value == 4096  # prompt and response
    split = load_spec("dapo-7b", sets=["data.max_response_length=14336"]).spec
    assert budget.without_estimate(split, "")[UPDATE].value == 16384
    halves = load_spec("dapo-14b").spec
    assert budget.without_estimate(halves, "")[UPDATE].value == 22528 // 2


def test_passes_on_a_cpu_are_bounded_by_their_logits(shape: ModelShape) -> None:
    spec = load_spec("tiny").spec
    tokens = [budget.on_cpu(spec, replace(shape, vocab=vocab))[UPDATE].value for vocab in (259, 49_152, 152_064)]
    assert tokens == [32768, 5120, 1024]
    assert GIB >= 4 * 49_152 * 5120
    assert budget.on_cpu(spec, None)[LOG_PROBS].value == 4096
    long = load_spec("gsm8k-tiny-cpu", sets=["data.max_response_length=4000"]).spec
    assert budget.on_cpu(long, replace(shape, vocab=152_064))[CRITIC].value == 4512

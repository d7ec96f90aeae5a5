"""The advice agrees with the truth: tokens are sampled, verl's metrics computed from them, and moments, bounds and the
advice compared with the tokens themselves.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_cli.plugins.staleness import Tally
from flashrl_cli.runs import mismatch
from flashrl_cli.runs.mismatch import (
    ALIKE,
    CAPS,
    HALF,
    NEGLIGIBLE,
    NOTABLE,
    RECENT,
    SOURCES,
    Advice,
    Moments,
    advise,
    percent,
    pool,
    usable_ratios,
)
from flashrl_cli.verl.metrics import read_step
from tests.unit.runs import sampled
from tests.unit.runs.on_disk import by_staleness
from tests.unit.runs.sampled import Batch, mean

# ratios of the sampled tokens

LOGS = st.tuples(st.floats(-6, 0), st.floats(-6, 0))
BATCHES = st.lists(st.lists(st.lists(LOGS, min_size=1, max_size=6), min_size=3, max_size=3), min_size=1, max_size=3)
CAP = st.floats(1, 20)
SLACK = 1e-9


@given(BATCHES, CAP)
def test_pooled_moments_are_those_of_all_tokens(batches: list[Batch], cap: float) -> None:
    seen, r = pool(sampled.steps(batches, cap)), sampled.ratios(batches)
    w = [min(one, cap) for one in r]
    assert seen.ratios.mean == pytest.approx(mean(r))
    assert seen.ratios.square == pytest.approx(mean([one**2 for one in r]))
    assert seen.kl == pytest.approx(-mean([math.log(one) for one in r]), abs=1e-9)
    assert seen.weights
    assert seen.weights.moments.mean == pytest.approx(mean(w))
    assert seen.weights.moments.square == pytest.approx(mean([one**2 for one in w]))
    assert seen.weights.moments.effective == pytest.approx(sum(w) ** 2 / sum(one**2 for one in w) / len(w))
    assert seen.weights.above == pytest.approx(sum(one > cap for one in r) / len(r))
    assert seen.tokens == pytest.approx(len(r))
    assert seen.cut == pytest.approx(mean([max(0.0, one - cap) for one in r]), abs=1e-8)
    assert mean([abs(one - 1) for one in r]) <= seen.deviation + 1e-6
    without = pool(sampled.steps(batches, None))
    assert (without.weights, without.cut, without.deviation) == (None, None, seen.deviation)


@given(BATCHES, CAP, CAP, st.booleans())
def test_bounds_for_another_cap_hold(batches: list[Batch], cap: float, other: float, off: bool) -> None:
    seen, r = pool(sampled.steps(batches, None if off else cap)), sampled.ratios(batches)
    least, most = seen.cut_at(other)
    assert least - 1e-7 <= mean([max(0.0, one - other) for one in r]) <= most + 1e-7
    assert mean([min(one, other) ** 2 for one in r]) <= seen.square_at(other) * (1 + SLACK) + 1e-7
    assert mean([float(one > other) for one in r]) <= seen.ratios.share_above(other) + SLACK


@given(st.floats(0.1, 5), st.floats(0, 5), st.floats(0.1, 50))
def test_the_bound_of_the_excess_is_met_by_two_points(average: float, spread: float, cap: float) -> None:
    moments = Moments(average, average**2 + spread**2)
    spread = math.sqrt(moments.square - average**2)  # what a float keeps of a small one
    if 2 * average * cap < moments.square:
        high, share = moments.square / average, average**2 / moments.square  # and zero
    else:
        distance = math.hypot(cap - average, spread)
        high = cap + distance
        share = (1 - (cap - average) / distance) / 2 if distance else 0.0
    assert moments.excess(cap) == pytest.approx(share * (high - cap), abs=1e-9)


def test_what_is_missing_is_not_known() -> None:
    data = sampled.logged(sampled.sample(0.1, responses=2), 2)
    for name in ("perf/total_num_tokens", "training/rollout_probs_diff_mean", "training/rollout_probs_diff_max"):
        del data[name]
    seen = pool([read_step(1, data)])
    assert (seen.tokens, seen.mean_error, seen.prob_diff, seen.prob_diff_max) == (None, None, None, None)
    data["response_length/mean"] = None
    assert pool([read_step(1, data)]).length is None
    data |= {"response_length/mean": 0.0, "perf/total_num_tokens": 20.0}
    empty = pool([read_step(1, data)])
    assert (empty.tokens, empty.mean_error) == (0.0, None)
    assert Moments(0.0, 0.0).effective == 0


@pytest.mark.parametrize("name", ["rollout_corr/kl", "rollout_corr/k3_kl", "rollout_corr/chi2_token"])
def test_a_step_without_a_finite_value_is_of_no_use(name: str) -> None:
    data = sampled.logged(sampled.sample(0.1, responses=1), 2)
    assert usable_ratios(read_step(1, data))
    assert not usable_ratios(read_step(1, data | {name: None}))


# advice


def outliers(share: float, wild: float, calm: float = 0.05) -> Callable[[random.Random], float]:
    """Few tokens at which the trainer's logits are far from the rollout's."""
    return lambda rng: wild if rng.random() < share else calm


def advice(batch: Batch, cap: float | None) -> Advice:
    return advise(sampled.steps([batch], cap), cap)


def cut(batch: Batch, cap: float) -> float:
    return mean([max(0.0, r - cap) for r in sampled.ratios([batch])])


def effective(batch: Batch, cap: float) -> float:
    w = [min(r, cap) for r in sampled.ratios([batch])]
    return mean(w) ** 2 / mean([one**2 for one in w])


def deviation(batch: Batch) -> float:
    return mean([abs(r - 1) for r in sampled.ratios([batch])])


def holds(found: Advice, batch: Batch, cap: float | None) -> bool:
    """Whether a verdict is true of the tokens themselves."""
    largest = max(sampled.ratios([batch]))
    better, now = found.better or 0.0, cap or 0.0
    truth = {
        "optional": deviation(batch) < ALIKE and (cap is None or largest <= CAPS[0]),
        "lower": better < now
        and cut(batch, better or 1) < (NEGLIGIBLE if effective(batch, now or 1) >= HALF else NOTABLE),
        "raise": better > now and cut(batch, now) >= NOTABLE and effective(batch, better or 1) >= HALF,
        "keep": cut(batch, now) < NOTABLE and effective(batch, now or 1) >= HALF,
        "reduce": effective(batch, now or 1) < HALF or cut(batch, now) >= NOTABLE,
        "try": cap is None,
    }
    return truth[found.verdict]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0.002, 0.01, 0.05, 0.2, 0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.01, 0.05]),
    st.sampled_from([None, 1.5, *CAPS]),
    st.integers(0, 10_000),
)
def test_a_verdict_is_true_of_the_tokens(calm: float, share: float, cap: float | None, seed: int) -> None:
    batch = sampled.sample(outliers(share, 3.0, calm), responses=12, length=30, seed=seed)
    found = advice(batch, cap)
    if found.verdict != "check":
        assert holds(found, batch, cap), found.lines


def test_nearly_the_same_needs_no_tis() -> None:
    for cap in (2, None):
        assert advice(sampled.sample(0.005), cap).verdict == "optional"


def test_as_far_as_int8_a_cap_of_two_fits_and_one_of_eight_is_too_large() -> None:
    batch = sampled.sample(0.15)
    found = advice(batch, 2)
    assert found.verdict == "keep"
    assert found.seen
    assert 0.001 < found.seen.k3 < 0.05
    assert "far:" not in found.lines[0]
    larger = advice(batch, 8)
    assert (larger.verdict, larger.better) == ("lower", 2)
    assert cut(batch, 2) < NEGLIGIBLE


def test_outliers_that_carry_weight_want_a_larger_cap() -> None:
    batch = sampled.sample(outliers(0.06, 2.5))
    found = advice(batch, 2)
    assert (found.verdict, found.better) == ("raise", 4)
    assert cut(batch, 4) < cut(batch, 2)
    assert effective(batch, 4) >= HALF
    assert any("4" in line and "take it" in line for line in found.lines)
    said = " ".join(found.lines)
    r = sampled.ratios([batch])
    assert f"cuts {percent(mean([float(one > 2) for one in r]))} of the tokens and {percent(cut(batch, 2))}" in said
    assert f"leave {percent(effective(batch, 2))} of the tokens" in said
    assert f"{percent(effective(batch, 1e9))} without a cap" in said
    assert "that of one token by up to 4" in said


def test_too_far_apart_no_cap_helps() -> None:
    batch = sampled.sample(3.0)
    for cap in (2.0, 8.0):
        found = advice(batch, cap)
        assert found.verdict == "reduce"
        assert "That is far" in found.lines[0]
        assert "bf16" in found.lines[-1]


def test_a_ratio_that_carries_much_weight_is_no_matter_of_caps() -> None:
    batch = sampled.sample(0.05)
    rollout, _ = batch[0][0]
    batch[0][0] = (rollout, rollout + 5)  # r = 148
    found = advice(batch, 1000)
    assert effective(batch, 1000) < HALF
    assert found.verdict == "reduce"


def test_off_but_far_apart_a_cap_is_worth_trying() -> None:
    batch = sampled.sample(outliers(0.02, 1.5, 0.2))
    found = advice(batch, None)
    assert found.verdict == "try"
    assert found.better in CAPS
    assert f"--tis {found.better:g}" in found.lines[-1]
    assert found.seen
    assert cut(batch, found.better) <= found.seen.cut_at(found.better)[1]


def test_long_responses_add_the_nats_up() -> None:
    batch = sampled.sample(0.3, responses=3, length=400)
    seen = advice(batch, 2).seen
    assert seen
    assert seen.length
    assert f"{seen.k3 * seen.length:.2g} nats" in " ".join(advice(batch, 2).lines)
    assert "nats:" not in " ".join(advice(sampled.sample(0.01), 2).lines)


def test_tokens_that_the_rollout_never_samples_are_noticed() -> None:
    batch = sampled.sample(0.1, top=3)
    assert mean(sampled.ratios([batch])) < 0.95
    found = advice(batch, 2)
    assert found.verdict == "check"
    assert "top_p" in found.lines[-1]


def test_log_probs_that_are_not_those_of_the_sampling_are_noticed() -> None:
    batch = [[(rollout - 0.1, trainer) for rollout, trainer in response] for response in sampled.sample(0.1)]
    found = advice(batch, 2)
    assert found.verdict == "check"
    assert "not those that it samples by" in found.lines[-1]


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_mean_that_chance_explains_is_no_alarm(seed: int) -> None:
    assert advice(sampled.sample(0.2, responses=4, length=10, seed=seed), 2).verdict != "check"


def test_a_cap_without_weights_is_an_alarm() -> None:
    found = advise(sampled.steps([sampled.sample(0.1)], None), 2)
    assert found.verdict == "check"
    assert "nothing is corrected" in found.lines[-1]


def test_weights_above_the_cap_are_not_those_of_tokens() -> None:
    found = advise(sampled.steps([sampled.sample(2.0)], 8), 2)
    assert found.verdict == "check"
    assert "above the cap of 2" in found.lines[-1]


def test_an_unknown_cap_is_read_off_what_is_cut() -> None:
    assert advise(sampled.steps([sampled.sample(outliers(0.06, 2.5))], 2), None).cap == 2
    uncut = advise(sampled.steps([sampled.sample(0.15)], 8), None)
    assert (uncut.cap, uncut.verdict) == (None, "keep")
    assert "Nothing is cut" in " ".join(uncut.lines)


def test_only_recent_training_steps_are_judged() -> None:
    early, late = [sampled.sample(1.0, responses=2)] * 5, [sampled.sample(0.05, responses=2)] * RECENT
    validation = read_step(0, {"val-core/tiny/acc/mean@1": 0.5})
    seen = advise([validation, *sampled.steps([*early, *late], 2)], 2).seen
    assert seen
    assert (seen.first, seen.last) == (6, RECENT + 5)
    assert seen.k3 < 0.01


def test_nothing_logged_is_said() -> None:
    for steps in ([], [read_step(1, {"critic/score/mean": 0.5})]):
        found = advise(steps, 2)
        assert (found.verdict, found.seen) == ("unknown", None)
        assert "nothing about rollout against trainer" in found.lines[0]
        assert found.document()["values"] is None


def test_steps_beyond_a_floats_range_are_counted() -> None:
    data = sampled.logged(sampled.sample(0.1), 2)
    beyond = data | {"rollout_corr/k3_kl": None}
    assert "In the only step" in advise([read_step(1, beyond)], 2).lines[0]
    assert any(
        line.startswith("1 more of these") for line in advise([read_step(1, beyond), read_step(2, data)], 2).lines
    )


def test_what_arrived_of_weight_updates_is_said() -> None:
    data = sampled.logged(sampled.sample(0.1), 2)
    steps = [
        {"refit/codes_changed": 0.002, "refit/weights_changed": 0.02},
        {"refit/codes_changed": 0.004, "refit/weights_changed": 0.03, "refit/arrived": 0.9},
        {
            "refit/codes_changed": 0.003,
            "refit/weights_changed": 0.05,
            "refit/arrived": 0.8,
            "refit/update_cosine": 0.25,
        },
    ]
    found = [read_step(number, data | one) for number, one in enumerate(steps, 1)]
    said = [next(line for line in advise(found[:n], 2).lines if "8-bit" in line) for n in (1, 2, 3)]
    changes = [
        "A step changes 0.2 % of the rollout's 8-bit weights and 2 % of the bf16 weights that it is sent",
        "A step changes 0.3 % of the rollout's 8-bit weights and 2.5 % of the bf16 weights that it is sent",
        "A step changes 0.3 % of the rollout's 8-bit weights and 3 % of the bf16 weights that it is sent",
    ]
    since = ". Of all changes since the start "
    cosine = "and what changed has a cosine of 0.25 to them"
    arrived = ["", f"{since}90 % arrived on average", f"{since}80 % arrived on average, {cosine}"]
    assert said == [f"{change}{more}. [QuRL]" for change, more in zip(changes, arrived, strict=True)]
    assert not any("8-bit" in line for line in advise([read_step(1, data)], 2).lines)


def test_the_document_is_plain_data_with_its_sources() -> None:
    document = advice(sampled.sample(0.15), 2).document()
    assert json.loads(json.dumps(document)) == document | {"findings": json.loads(json.dumps(document["findings"]))}
    assert document["verdict"] == "keep"
    assert set(document["sources"]) <= set(SOURCES)
    assert {source for one in document["findings"] for source in one["sources"]} == set(document["sources"])


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (0.00001, "under 0.01 %"),
        (0.00123, "0.12 %"),
        (0.099, "9.9 %"),
        (0.0996, "10 %"),
        (0.996, "99.6 %"),
        (1, "100 %"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


# staleness


def aged(*kls: Mapping[Any, float], cap: float | None = 2.0, tokens: int = 1000) -> Advice:
    """Advice on steps with these KLs by staleness."""
    whole = {"rollout_corr/kl": 0.01, "rollout_corr/k3_kl": 0.01, "rollout_corr/chi2_token": 0.02}
    return advise([read_step(n, {**whole, **by_staleness(one, tokens)}) for n, one in enumerate(kls, 1)], cap)


def told(advice: Advice, start: str) -> str:
    return next((line for line in advice.lines if line.startswith(start)), "")


def test_figures_by_staleness_are_pooled_by_their_tokens() -> None:
    make = np.random.default_rng(3)
    tallies = [Tally(), Tally(), Tally()]
    for tally, size in zip(tallies[:2], (300, 700), strict=True):
        rollout, stale = -make.exponential(1, size), make.integers(0, 2, size)
        trainer = rollout + make.normal(0, 0.3, size)
        ratios = np.exp(trainer - rollout)
        for one in (tally, tallies[2]):
            one.add(stale, trainer, rollout, np.minimum(ratios, 1.2), ratios > 1.2)
    first, second, both = (read_step(number, tally.figures()) for number, tally in enumerate(tallies))
    assert [asdict(one) for one in mismatch.by_staleness([first, second])] == [
        pytest.approx(asdict(one)) for one in mismatch.by_staleness([both])
    ]


def test_what_of_the_kl_is_staleness_is_said_with_the_key_that_lowers_it() -> None:
    found = told(aged({0: 0.001, 1: 0.019}), "The tokens' staleness is 0.5 on average and 1 at most")
    assert "90 % of the KL comes from it, and 0.001 nats a token are the rollout's own" in found
    assert "trainer.prefetch" in found
    assert "`--rollout bf16`" not in found
    found = told(aged({0: 0.01, 1: 0.012}), "The tokens' staleness")
    assert "9.1 % of the KL comes from it" in found
    assert "`--rollout bf16` shows how far" in found
    assert "prefetch" not in found
    assert "Neither matters here" in told(aged({0: 1e-5, 1: 3e-5}), "The tokens' staleness")


def test_the_cap_cuts_more_of_stale_tokens() -> None:
    found = told(aged({0: 0.001, 3: 0.2}), "The cap of 2 cuts")
    assert found == "The cap of 2 cuts 0.05 % of the tokens without staleness and 10 % of those with 3."
    assert not told(aged({0: 0.001, 3: 0.2}, cap=None), "The cap of")


def test_the_rollouts_own_part_is_that_of_the_last_tokens_without_staleness() -> None:
    """Of those scored again, or of earlier steps: the first one has no others."""
    assert "90 % of the KL" in told(aged({1: 0.02, "fresh": 0.002}), "The tokens' staleness")
    assert "90 % of the KL" in told(aged({0: 0.002}, *[{1: 0.02}] * RECENT), "The tokens' staleness is 1 on average")
    assert "unknown" in told(aged({1: 0.02}), "The tokens' staleness is 1 on average and 1 at most; none was scored")
    assert "unknown" in told(aged({0: 0.002}, {1: 0.02}, tokens=10), "The tokens' staleness")


def test_nothing_is_said_of_staleness_where_there_is_none() -> None:
    assert aged({0: 0.001}).lines[1].startswith("Every token was sampled by the weights that it is weighted against")
    found = advise([read_step(1, sampled.logged(sampled.sample(0.1), 2.0))], 2.0)
    assert (found.stale, "by_staleness" in found.document()) == ((), False)
    assert "staleness" not in " ".join(found.lines)

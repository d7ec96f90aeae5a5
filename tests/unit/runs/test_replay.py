"""Corrections replayed on kept log-ratios: their weights, and the same winner as enumerated gradients."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.plugins import log_ratios
from flashrl_cli.plugins.log_ratios import Sample, file_of, write
from flashrl_cli.runs import store
from flashrl_cli.runs.replay import (
    CHECKED,
    COMPARED,
    Correction,
    Limits,
    Reject,
    Replayed,
    by_position,
    correction_of,
    histogram,
    judge,
    kept_steps,
    planned,
    replay,
    replay_run,
    weights,
)
from tests.unit.runs import on_disk
from tests.unit.runs.on_disk import attempt, make

VOCABULARY, LENGTH, TOYS, DRAWN = 8, 3, 24, 1024
SEQUENCES = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
"""All 8³ responses of the toy."""
FEW = (
    Correction(),
    Correction(kind="tis", cap=2),
    Correction(kind="tis", cap=4),
    Correction(kind="icepop", lower=0.5, cap=5),
    Correction(kind="seq-tis", cap=2),
    Correction(kind="seq-tis", cap=4),
    Correction(kind="seq-tis", cap=8),
    Correction(reject=Reject(by="token", lower=0.5, upper=2)),
    Correction(reject=Reject(by="seq-sum", lower=0.5, upper=2)),
)
CLEAR = 0.05
"""Corrections whose exact errors differ by less are as good as each other."""


class Toy:
    """A policy of one softmax a previous token, a sampler with noisy logits, and rewards for 3 of 10 responses.

    Everything is enumerated: `p` and `q` are the probabilities [512] of all responses, `log_ratios` is [512, 3],
    `terms` [512, 3, 72] the gradients of the tokens' log-probs, and `gradient` [72] the policy gradient.
    """

    def __init__(self, seed: int, level: float) -> None:
        make = np.random.default_rng(seed)
        logits = make.normal(size=(VOCABULARY + 1, VOCABULARY))
        before = np.concatenate([np.full((len(SEQUENCES), 1), VOCABULARY), SEQUENCES[:, :-1]], 1)
        log_p, log_q = (log_softmax(z)[before, SEQUENCES] for z in (logits, logits + level * make.normal(size=(9, 8))))
        self.log_ratios = log_p - log_q
        self.p, self.q = np.exp(log_p.sum(1)), np.exp(log_q.sum(1))
        reward = (make.random(len(SEQUENCES)) < 0.3).astype(float)
        mean = self.q @ reward
        self.advantages = (reward - mean) / math.sqrt(self.q @ (reward - mean) ** 2)
        terms = np.zeros((*SEQUENCES.shape, *logits.shape))
        rows, columns = np.ogrid[: len(SEQUENCES), :LENGTH]
        terms[rows, columns, before] -= np.exp(log_softmax(logits))[before]
        terms[rows, columns, before, SEQUENCES] += 1
        self.terms = terms.reshape(*SEQUENCES.shape, -1)
        each = self.advantages[:, None] * self.terms.sum(1)
        self.gradient = self.p @ each
        self.power = float(self.p @ (each**2).sum(1))
        """Mean square of a response's gradient."""

    def kept(self, rows: Any = slice(None)) -> Replayed:
        """Some responses as a run keeps them, but exact."""
        return Replayed(self.log_ratios[rows].ravel(), np.full(len(SEQUENCES[rows]), LENGTH), self.advantages[rows])

    def drawn(self, seed: int) -> Replayed:
        """What a run keeps of responses that are drawn from the sampler: float16."""
        rows = np.random.default_rng(seed).choice(len(SEQUENCES), DRAWN, p=self.q / self.q.sum())
        return Replayed.of([sample(self.log_ratios[rows], self.advantages[rows])])

    def error(self, correction: Correction, signal: float) -> float:
        """The exact mean squared error of the gradient, over the noise of a batch without mismatch.

        The batch is so large that the gradient's squared length over that noise is `signal`.
        """
        responses = signal * self.power / float(self.gradient @ self.gradient)
        found = weights(self.kept(), correction).reshape(SEQUENCES.shape)
        scaled = found / (self.q @ found.mean(1))
        each = ((self.advantages[:, None] * scaled)[:, None] @ self.terms)[:, 0]
        mean = self.q @ each
        variance = self.q @ (each**2).sum(1) - mean @ mean
        return float((((mean - self.gradient) ** 2).sum() + variance / responses) / (self.power / responses))


def log_softmax(logits: Any) -> Any:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def sample(log_ratios: Any, advantages: Any = None, step: int = 1) -> Sample:
    """A sample of responses of the same length [responses, tokens]."""
    count, length = np.shape(log_ratios)
    return Sample(
        step=step,
        responses=2 * count,
        log_ratios=np.ravel(log_ratios).astype(np.float16),
        lengths=np.full(count, length, np.int32),
        advantages=np.asarray(np.ones(count) if advantages is None else advantages, np.float32),
    )


@functools.cache
def toys(level: float) -> list[Toy]:
    return [Toy(seed, level) for seed in range(TOYS)]


@pytest.mark.parametrize("signal", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("level", [0.1, 0.2, 0.4, 0.6])
def test_the_winner_is_that_of_enumerated_gradients(level: float, signal: float) -> None:
    """Over policies, rewards and mismatches: none at a small signal, sequences at a large one."""
    kept = [toy.drawn(seed) for seed, toy in enumerate(toys(level))]
    exact = np.array([[toy.error(one, signal) for one in FEW] for toy in toys(level)])
    estimated = np.array([[judge(found, one).error(signal) for one in FEW] for found in kept])
    least, second = np.sort(exact.mean(0))[:2]
    assert np.mean([toy.q @ -toy.log_ratios.sum(1) for toy in toys(level)]) <= CHECKED
    best, named = exact.mean(0).argmin(), estimated.mean(0).argmin()
    assert exact.mean(0)[named] <= (1 + CLEAR) * least
    assert named == best or second <= (1 + CLEAR) * least
    assert estimated.mean(0)[best] == pytest.approx(least, rel=0.1)
    # one problem alone: its errors may be more or less parallel than is assumed
    regret = np.take_along_axis(exact, estimated.argmin(1)[:, None], 1)[:, 0] / exact.min(1)
    assert np.median(regret) == 1
    assert regret.max() <= 1.2


def test_the_bound_alone_would_name_another_winner() -> None:
    """Why the error is not the bound's square plus the noise over the responses: it would never truncate enough."""
    level, signal = 0.6, 1.0
    by_bound = []
    for seed, toy in enumerate(toys(level)):
        responses = signal * toy.power / float(toy.gradient @ toy.gradient)
        judged = [judge(toy.drawn(seed), one) for one in FEW]
        by_bound.append([(one.bias or 0) ** 2 + (one.noise or 0) / responses for one in judged])
    exact = np.mean([[toy.error(one, signal) for one in FEW] for toy in toys(level)], 0)
    assert exact[np.mean(by_bound, 0).argmin()] > 1.1 * exact.min()


# weights


def kept_of(*responses: list[float], advantages: list[float] | None = None) -> Replayed:
    """Kept responses with these importance weights of their tokens."""
    lengths = np.array([len(one) for one in responses])
    return Replayed(np.log(np.concatenate(responses)), lengths, np.array(advantages or [1.0] * len(responses)))


TWO = ([0.5, 4.0, 1.0], [3.0])


@pytest.mark.parametrize(
    ("correction", "right"),
    [
        (Correction(), [1, 1, 1, 1]),
        (Correction(kind="tis", cap=2), [0.5, 2, 1, 2]),
        (Correction(kind="icepop", lower=0.6, cap=3.5), [0, 0, 1, 3]),
        (Correction(kind="seq-tis", cap=2.5), [2, 2, 2, 2.5]),
        (Correction(kind="tis", cap=2, reject=Reject(by="token", upper=2)), [0.5, 0, 1, 0]),
        (Correction(reject=Reject(by="seq-sum", lower=1, upper=2.5)), [1, 1, 1, 0]),
        (Correction(reject=Reject(by="seq-mean", lower=1, upper=2)), [1, 1, 1, 0]),
        (Correction(reject=Reject(by="seq-max", estimator="k3", upper=1)), [0, 0, 0, 1]),
    ],
)
def test_weights(correction: Correction, right: list[float]) -> None:
    assert weights(kept_of(*TWO), correction) == pytest.approx(right)


def test_values_of_a_correction() -> None:
    """By hand: tokens of weights 0.5, 4, 1 | 3 at cap 2, advantages 2 and -1."""
    found = judge(kept_of(*TWO, advantages=[2.0, -1.0]), Correction(kind="tis", cap=2))
    assert (found.mean, found.cut, found.touched) == pytest.approx((5.5 / 4, 3 / 4, 1 / 2))
    assert found.effective == pytest.approx(5.5**2 / 4 / 9.25)
    u, product = np.array([0.5, 2, 1, 2]) / (5.5 / 4), np.array([2, 2, 2, 3]) / (9 / 4)
    size = np.array([2, 2, 2, 1])
    assert found.bias == pytest.approx((size * abs(u - product)).sum() / 7)
    assert found.noise == pytest.approx((size**2 * u**2).sum() / 13)
    assert found.error(2) == pytest.approx(math.pi * (found.bias or 0) ** 2 + (found.noise or 0))


def test_without_mismatch_all_corrections_are_alike_and_none_is_named() -> None:
    found = replay([sample(np.zeros((4, 5)))], Correction(kind="tis", cap=2))
    assert {(one.bias, one.noise, one.cut, one.effective) for one in found.judged} == {(0.0, 1.0, 0.0, 1.0)}
    assert found.best.correction == Correction()
    assert len(found.alike) == len(found.judged) - 1 == len(COMPARED) - 1


def test_a_correction_that_leaves_nothing_comes_last() -> None:
    found = replay([sample(np.full((2, 3), 2.0))], Correction(kind="icepop", lower=0.9, cap=1.1))
    last = found.judged[-1]
    assert (last.mean, last.bias, last.error()) == (0.0, None, math.inf)
    assert next(row for row in found.document()["corrections"] if row["name"] == str(last.correction))["error"] is None


def test_unknown_advantages_count_as_the_others_and_none_at_all_as_one() -> None:
    assert Replayed.of([sample(np.zeros((3, 1)), [3.0, math.nan, -4.0])]).advantages == pytest.approx(
        [3, math.sqrt(12.5), -4]
    )
    assert Replayed.of([sample(np.zeros((2, 1)), [math.nan] * 2)]).advantages == pytest.approx([1, 1])
    assert kept_of([1.0, 1.0], [1.0], advantages=[0.0, 0.0]).sizes == pytest.approx([1, 1, 1])


def test_long_responses_with_vanishing_products_are_warned_of() -> None:
    make = np.random.default_rng(0)
    found = replay([sample(make.normal(-0.025, 0.05**0.5, (64, 400)))], None)
    assert found.mean_product < 0.5
    assert found.divergence == pytest.approx(10, abs=4 * (0.05 * 400 / 64) ** 0.5)
    for text in ("too few for the tail", "nats a response apart"):
        assert any(text in line for line in found.lines)
        assert not any(text in line for line in replay([sample(np.zeros((4, 5)))], None).lines)


def test_what_would_end_a_run_comes_last_and_is_not_named() -> None:
    """Weights of responses whose mean is below a half, although their error is less than that of no correction."""
    make = np.random.default_rng(1)
    samples = [sample(make.normal(-0.01, 0.02**0.5, (256, 250)))]
    own = Correction(kind="icepop", lower=0.999, cap=1.001)
    found = replay(samples, own)
    stopped = [one.correction for one in found.judged if one.stopped]
    assert Correction(kind="seq-tis", cap=2) in stopped
    assert own in stopped
    assert [one.correction for one in found.judged[-len(stopped) :]] == stopped
    assert not any(found.best_at(signal).stopped for signal in (0.25, 1, 100))
    widely = replay(samples, own, Limits(max_weight_deviation=1, max_rejected=1))
    assert not any(one.stopped for one in widely.judged)
    assert widely.best_at(100).correction.kind == "seq-tis"
    rejecting = Correction(reject=Reject(by="seq-sum", upper=1.01))
    assert judge(Replayed.of(samples), rejecting).stopped


# pictures


def test_a_histogram_holds_all_tokens() -> None:
    kept = kept_of([1.0] * 500, [math.e**9])
    found = histogram(kept)
    assert sum(found.shares) == pytest.approx(1)
    assert found.edges[0] == -found.edges[-1]
    assert found.shares[-1] == pytest.approx(1 / 501), "what is beyond the last edge is in the last bin"


def test_weights_by_position_multiply_along_the_response() -> None:
    found = by_position(kept_of(*([2.0] * 48 for _ in range(20)), [2.0] * 2))
    assert [(one.first, one.last) for one in found[:2]] == [(1, 2), (3, 4)]
    assert found[0].tokens == 42
    assert found[1].tokens == 40
    assert (found[0].low, found[0].high) == pytest.approx((2, 4))
    assert (found[1].low, found[1].high) == pytest.approx((8, 16))
    assert {one.distance for one in found} == {1.0}


def test_positions_that_few_responses_reach_are_left_out() -> None:
    found = by_position(kept_of(*([1.0] * 24 for _ in range(20)), [1.0] * 48))
    assert found[-1].last == 24


# a run


def test_the_last_steps_of_the_newest_attempts_are_replayed() -> None:
    run = make("r", attempt(1), attempt(2, resumed_from=2))
    for number, steps in ((1, (1, 2, 3, 4)), (2, (3,))):
        for step in steps:
            write(run.attempt(number).log_ratios, sample(np.full((2, 3), number / 10), step=step))
    found = store.find("r")
    assert [path.parent.parent.name for path in kept_steps(found).values()] == ["attempt_1"] * 2 + ["attempt_2"]
    assert replay_run(found).steps == (1, 2, 3)
    assert (replay_run(found, last=2).steps, replay_run(found, last=2).trained) == ((2, 3), 8)
    assert replay_run(found, step=3).mean_product == pytest.approx(math.exp(0.6), rel=1e-3)
    with pytest.raises(InputError, match="no log-ratios of step 7") as caught:
        replay_run(found, step=7)
    assert caught.value.hint == "there are: 1 to 3"


def test_the_kept_tokens_are_replayed_by_staleness() -> None:
    run = make("r", attempt(1))
    on_disk.planned(run, 1, correction={"kind": "tis", "cap": 1.1})
    on_disk.kept(run, 1, 1, 2, stale=True)
    read = [log_ratios.read(path) for path in kept_steps(store.find("r")).values()]
    logs, stale = (np.concatenate([getattr(one, name) for one in read]).astype(float) for name in FIELDS)
    found = replay_run(store.find("r"))
    assert [one.staleness for one in found.by_staleness] == [0, 1]
    for one in found.by_staleness:
        mine = logs[stale == one.staleness]
        w = np.minimum(np.exp(mine), 1.1)
        assert (one.tokens, one.share) == (len(mine), len(mine) / len(logs))
        assert (one.kl, one.kl_k3) == pytest.approx((-mine.mean(), (np.exp(mine) - mine - 1).mean()))
        assert (one.weight_mean, one.effective) == pytest.approx((w.mean(), w.mean() ** 2 / (w**2).mean()))
        assert one.truncated == (np.exp(mine) > 1.1).mean()
    assert found.document()["by_staleness"][1]["staleness"] == 1


FIELDS = ("log_ratios", "staleness")


def test_responses_of_one_staleness_are_replayed_alone() -> None:
    run = make("r", attempt(1))
    on_disk.kept(run, 1, 1, 2, stale=True)
    every, fresh, stale = (replay_run(store.find("r"), staleness=number) for number in (None, 0, 1))
    assert (every.responses, fresh.responses, stale.responses) == (80, 20, 60)
    assert [one.staleness for one in fresh.by_staleness] == [0]
    assert [one.staleness for one in stale.by_staleness] == [0, 1], "some of their tokens"
    with pytest.raises(InputError, match="no kept response has a staleness of 2") as caught:
        replay_run(store.find("r"), staleness=2)
    assert caught.value.hint == "there are: 0 to 1"


def test_a_synchronous_run_is_not_replayed_by_staleness() -> None:
    run = make("r", attempt(1))
    on_disk.kept(run, 1, 1)
    found = replay_run(store.find("r"))
    assert (found.by_staleness, "by_staleness" in found.document()) == ((), False)
    assert replay_run(store.find("r"), staleness=0).responses == found.responses


@pytest.mark.parametrize(
    ("correction", "hint"),
    [(None, "before flashrl kept them"), ({"keep_responses": 0}, "is 0"), ({"keep_responses": 9}, "--tis CAP")],
)
def test_a_run_that_kept_nothing(correction: dict[str, int] | None, hint: str) -> None:
    run = make("r", attempt(1))
    if correction:
        on_disk.planned(run, 1, correction=correction)
    with pytest.raises(NothingMatched, match="kept no log-ratios") as caught:
        replay_run(store.find("r"))
    assert hint in str(caught.value.hint)


def test_damaged_steps_are_named_and_the_others_read() -> None:
    run = make("r", attempt(1))
    folder = run.attempt(1).log_ratios
    write(folder, sample(np.zeros((2, 3)), step=1))
    file_of(folder, 2).write_bytes(file_of(folder, 1).read_bytes()[:-40])
    found = replay_run(store.find("r"))
    assert found.steps == (1,)
    assert [f"{Path('step_000002.npz')} is damaged" in one for one in found.damaged] == [True]
    with pytest.raises(InputError, match="is damaged"):
        replay_run(store.find("r"), step=2)


@pytest.mark.parametrize(
    ("spec", "right"),
    [
        ({}, "none"),
        ({"cap": 2.0}, "tis 2"),
        ({"kind": "seq-tis", "cap": 4.0, "lower": None}, "seq-tis 4"),
        ({"kind": "icepop", "cap": 5.0, "lower": 0.5}, "icepop 0.5 to 5"),
        (
            {"kind": "none", "reject": {"by": "token", "estimator": "k1", "lower": None, "upper": 2.0}},
            "reject token k1 0.5 to 2",
        ),
    ],
)
def test_the_runs_own_correction(spec: dict[str, Any], right: str) -> None:
    assert str(correction_of(spec)) == right


def test_the_limits_are_those_of_the_runs_watch() -> None:
    run = make("r", attempt(1))
    on_disk.planned(run, 1, correction={"cap": 2.0}, watch={"max_weight_deviation": 0.7, "max_kl": 0.1})
    assert planned(store.find("r")) == (Correction(kind="tis", cap=2), Limits(max_weight_deviation=0.7))
    assert planned(store.find(make("new").name)) == (None, Limits())

"""The processes of a benchmark without vLLM and Transformers: what they get and give, and statistics of a mismatch by
hand.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.bench import engine, scorer
from flashrl_cli.bench.job import EngineJob, Samples
from flashrl_cli.bench.scorer import knows_nothing, statistics
from flashrl_cli.errors import InputError
from tests.unit.bench.lab import OPTIONS

JOB = EngineJob(
    model="/hf",
    weights=None,
    arguments={"quantization": None},
    options=OPTIONS,
    questions=None,
    response=8,
    longest=None,
)
SAMPLES = Samples(prompts=[[1, 2], [3]], responses=[[4], [5, 6, 7]], logprobs=[[-0.5], [-1.0, -2.0, -0.25]])


def test_an_engines_job_comes_back() -> None:
    assert EngineJob.of(json.loads(json.dumps(asdict(JOB)))) == JOB


def test_samples_come_back(tmp_path: Path) -> None:
    SAMPLES.write(tmp_path / "a.npz")
    assert Samples.read(tmp_path / "a.npz") == SAMPLES
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_batches_hold_like_lengths_and_every_sample_once() -> None:
    lengths = [3, 9, 4, 40, 10]
    samples = Samples(prompts=[[0]] * 5, responses=[[0] * (n - 1) for n in lengths], logprobs=[])
    assert list(scorer._batches(samples, 20)) == [[3], [4, 1], [2, 0]]


class Rollout:
    """Answers each order with its own words."""

    started = 0

    def __init__(self, job: EngineJob) -> None:
        Rollout.started += 1

    def facts(self) -> dict[str, Any]:
        return {"kv_tokens": 1}

    def speed(self, *, batch: int, advance: Any) -> dict[str, Any]:
        advance("5 tokens/s")
        return {"batch": batch}

    def refit(self, *, repeats: int) -> dict[str, Any]:
        return {"repeats": repeats}

    def sample(self, *, samples: int, out: str) -> dict[str, Any]:
        return {"samples": samples, "out": out}


def test_one_engine_fulfils_all_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Rollout", Rollout)
    orders: list[dict[str, Any]] = [
        {"kind": "start"},
        {"kind": "speed", "batch": 4},
        {"kind": "refit", "repeats": 2},
        {"kind": "sample", "samples": 3, "out": "x"},
    ]
    events: list[dict[str, Any]] = []
    engine.serve(asdict(JOB), iter(orders), lambda event, **more: events.append({"event": event, **more}))
    assert Rollout.started == 1
    assert events == [
        {"event": "done", "result": {"kv_tokens": 1}},
        {"event": "advance", "note": "5 tokens/s"},
        {"event": "done", "result": {"batch": 4}},
        {"event": "done", "result": {"repeats": 2}},
        {"event": "done", "result": {"samples": 3, "out": "x"}},
    ]


def limit(prompts: list[list[int]], longest: int | None) -> int:
    """Longest sequence of an engine whose options say 112."""
    made = object.__new__(engine.Rollout)
    made._job, made._prompts = replace(JOB, response=100, longest=longest), prompts
    return made._limit()


def test_no_response_is_cut_by_the_engines_limit() -> None:
    assert limit([], 50) == 112
    assert limit([[1] * 5], 2048) == 112
    assert limit([[1] * 5, [1] * 40], None) == 140
    with pytest.raises(InputError, match="need 140 tokens, the limit is 120"):
        limit([[1] * 40], 120)


@pytest.mark.parametrize(("batch", "fitting", "decoding"), [(4, 4, True), (8, 4, False), (0, 4, True)])
def test_decoding_alone_has_a_speed_where_all_sequences_run_at_once(
    batch: int, fitting: int, decoding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill of those that wait for others would be in it."""
    monkeypatch.setattr(engine.Rollout, "_fitting", lambda self, length: fitting)
    monkeypatch.setattr(engine.Rollout, "_seconds", lambda self, batch, prompt, response, seed: float(response))
    made = object.__new__(engine.Rollout)
    found = made.speed(batch=batch, prompt=8, response=5, repeats=2, advance=print)
    assert found["batch"] == (batch or fitting)
    assert (found["tokens_s"], found["prefill_s"]) == (float(batch or fitting), 1.0)
    assert ("decode_tokens_s" in found) is decoding


def test_decoding_has_a_speed_only_where_it_took_time() -> None:
    assert engine._decoding(60, [2.0, 3.0, 4.0]) == {"decode_tokens_s": 20.0, "decode_values": [30.0, 20.0, 15.0]}
    assert engine._decoding(0, [0.1]) == {}, "a response of one token is prefill alone"
    assert engine._decoding(60, [2.0, -0.001]) == {}


LOG2 = math.log(2)
# ratios p_train / p_rollout: 1, 2, 1/2 in a first sequence, 4 in a second
ROLLOUT = [-1.0, -2.0, -1.0, -3.0]
TRAIN = [-1.0, -2.0 + LOG2, -1.0 - LOG2, -3.0 + 2 * LOG2]


def by_hand() -> dict[str, Any]:
    return statistics(ROLLOUT, TRAIN, [3, 1])


def test_differences_and_both_estimators_of_the_kl() -> None:
    found, kl = by_hand()["abs_difference"], by_hand()["kl"]
    assert found["mean"] == pytest.approx((0 + 1 + 1 + 2) * LOG2 / 4)
    assert found["max"] == pytest.approx(2 * LOG2)
    # between the third and the fourth of 0, 1, 1, 2 (times log 2), at 0.99 * 3 = 2.97 of the way
    assert found["p99"] == pytest.approx((1 + 0.97) * LOG2)
    assert kl["k1"] == pytest.approx(-(0 + 1 - 1 + 2) * LOG2 / 4)
    assert kl["k3"] == pytest.approx(((1 + 2 + 0.5 + 4) - 4 - 2 * LOG2) / 4)


def test_the_error_of_the_kl_is_that_of_sequences() -> None:
    """The tokens of a sequence depend on each other; if they are all the same, they say no more than one of them."""
    first, second = (1 + 2 + 0.5) - 3, 4 - 1 - 2 * LOG2
    mean = (first + second) / 4
    residuals = (first - 3 * mean) ** 2 + (second - mean) ** 2
    assert by_hand()["kl"]["k3_error"] == pytest.approx(math.sqrt(2 * residuals) / 4)
    once = statistics([-1.0] * 4, [-1.0, -1.5, -0.5, -1.25], [1] * 4)["kl"]["k3_error"]
    repeated = statistics([-1.0] * 12, [-1.0] * 3 + [-1.5] * 3 + [-0.5] * 3 + [-1.25] * 3, [3] * 4)["kl"]["k3_error"]
    assert once == pytest.approx(repeated)
    assert statistics(ROLLOUT, TRAIN, [4])["kl"]["k3_error"] == 0


def test_weights_of_tokens() -> None:
    found = by_hand()["token_weights"]
    assert (found["mean"], found["min"], found["max"]) == (
        pytest.approx(7.5 / 4),
        pytest.approx(0.5),
        pytest.approx(4),
    )
    assert (found["above_2"], found["above_8"]) == (0.25, 0.0)
    assert found["effective"] == pytest.approx(7.5**2 / (1 + 4 + 0.25 + 16) / 4)


def test_weights_of_sequences_are_products_and_geometric_means() -> None:
    found = by_hand()
    assert found["sequences"] == 2
    assert found["sequence_weights"]["mean"] == pytest.approx((1 * 2 * 0.5 + 4) / 2)
    assert found["sequence_weights"]["effective"] == pytest.approx((1 + 4) ** 2 / (1 + 16) / 2)
    assert found["sequence_geometric"]["mean"] == pytest.approx((1 + 4) / 2)
    long = statistics([-1.0] * 4, [-1.0 + LOG2] * 4, [4])
    assert long["sequence_weights"]["max"] == pytest.approx(16)
    assert long["sequence_geometric"]["max"] == pytest.approx(2)


def test_the_same_on_both_sides_is_no_mismatch() -> None:
    found = statistics(ROLLOUT, ROLLOUT, [4])
    assert found["abs_difference"] == {"mean": 0, "p99": 0, "max": 0}
    assert (found["kl"]["k1"], found["kl"]["k3"], found["token_weights"]["effective"]) == (0, 0, 1)


def test_what_is_far_off_stays_finite() -> None:
    assert statistics([-600.0, 0.0], [0.0, 0.0], [2])["token_weights"]["effective"] == pytest.approx(0.5)
    found = statistics([-30.0] * 40, [0.0] * 40, [40])
    assert math.isfinite(found["sequence_weights"]["mean"])
    assert found["sequence_weights"]["above_8"] == 1.0


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=30))
def test_k3_is_never_negative_and_shares_are_shares(pairs: list[tuple[float, float]]) -> None:
    found = statistics([a for a, _ in pairs], [b for _, b in pairs], [len(pairs)])
    assert found["kl"]["k3"] >= 0
    assert 0 < found["token_weights"]["effective"] <= 1 + 1e-9
    assert 0 <= found["token_weights"]["above_8"] <= found["token_weights"]["above_2"] <= 1


@pytest.mark.parametrize(
    ("rollout", "train", "lengths", "message"),
    [
        ([-1.0], [-1.0, -2.0], [1], "do not fit"),
        ([-1.0, -2.0], [-1.0, -2.0], [1], "do not fit"),
        ([-1.0], [-1.0], [1, 0], "do not fit"),
        ([], [], [], "do not fit"),
        ([-1.0, math.nan], [-1.0, -1.0], [2], "not finite"),
        ([-1.0, -math.inf], [-1.0, -1.0], [2], "not finite"),
    ],
)
def test_what_are_no_log_probs_of_sequences_is_refused(
    rollout: list[float], train: list[float], lengths: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        statistics(rollout, train, lengths)


def test_a_policy_with_random_weights_is_told() -> None:
    assert knows_nothing(0.95 * math.log(259), 259)
    assert not knows_nothing(0.5 * math.log(259), 259)

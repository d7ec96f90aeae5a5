"""The front of speed against KL claims no more than repeats and errors support, and recommends by what is left of the
tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.bench.front import Front, Point, fronts


def point(name: str, speed: float, kl: float, *, spread: float = 1.0, error: float = 0.0002, left: float = 1) -> Point:
    """A variant whose three repeats are `spread` apart."""
    return Point(name=name, values=[speed, speed - spread, speed + spread], kl=kl, kl_error=error, effective=left)


BF16 = point("bf16", 100, 0.001, left=0.999)
INT8 = point("int8", 130, 0.0055, left=0.99)
PLAIN = point("int8+plain", 131, 0.033, left=0.96)
FP8 = point("fp8", 126, 0.025, left=0.963)


def test_what_is_as_fast_and_nearer_beats() -> None:
    assert INT8.beats(PLAIN)
    assert INT8.beats(FP8)
    assert not INT8.beats(BF16)
    assert not BF16.beats(INT8)


def test_neither_beats_the_other_where_nothing_tells_them_apart() -> None:
    other = point("int8+kvint8", 129, 0.0057)
    assert not INT8.beats(other)
    assert not other.beats(INT8)
    assert not INT8.beats(INT8)


def test_what_is_surely_faster_and_farther_stays_on_the_front() -> None:
    faster = point("int8+kv8", 140, 0.014)
    assert {one.name for one in Front(64, [BF16, INT8, faster]).best} == {"bf16", "int8", "int8+kv8"}


def test_a_kl_that_is_hardly_known_beats_nothing() -> None:
    assert not point("int8", 130, 0.0055, error=0.02).beats(FP8 if FP8.faster(INT8) else point("x", 131, 0.025))


def test_the_sentence_says_what_to_take_and_what_it_beats() -> None:
    front = Front(64, [BF16, INT8, PLAIN, FP8])
    assert front.taken is INT8
    assert front.sentence("bf16") == (
        "at 64 sequences, by speed and KL: take int8, 1.30x of bf16, KL 0.0055; not beaten either: bf16 (KL 0.001); "
        "int8 is as fast as int8+plain and 6.0 times nearer; int8 is 1.03x as fast as fp8 and 4.5 times nearer"
    )
    assert front.sentence(None).startswith("at 64 sequences, by speed and KL: take int8, 130 tokens/s, KL 0.0055; not")


def test_where_nothing_is_faster_bf16_is_to_be_taken() -> None:
    slow = point("int8", 90, 0.0055)
    assert Front(0, [BF16, slow]).sentence("bf16") == (
        "with as many sequences as fit, by speed and KL: take bf16, KL 0.001; "
        "bf16 is 1.11x as fast as int8 and 5.5 times nearer"
    )


def test_a_little_speed_is_not_worth_the_tokens_that_it_costs() -> None:
    faster = point("fp8", 133.5, 0.025, spread=0.1, left=0.963)
    assert faster.faster(point("int8", 130, 0.0055))
    assert Front(64, [INT8, faster]).taken is INT8
    assert Front(64, [INT8, point("fp8", 140, 0.025, left=0.963)]).taken.name == "fp8"


def test_a_kl_of_zero_is_nearer_without_a_factor() -> None:
    exact = point("bf16", 100, 0.0, error=0.0)
    (_, sentence) = Front(1, [exact, point("int8", 50, 0.1)]).sentence("bf16").split("; ")
    assert sentence == "bf16 is 2.00x as fast as int8 and nearer"


def test_a_speed_without_repeats_is_said_to_be_one() -> None:
    once = Point(name="int8", values=[130.0], kl=0.0055, kl_error=0.0002, effective=0.99)
    assert Front(1, [BF16, once]).sentence("bf16").startswith("at 1 sequence, by speed (measured once) and KL: take i")


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(0, 9), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=7))
def test_no_point_of_the_front_is_beaten_and_every_other_one_is(
    drawn: list[tuple[float, float, float, float]],
) -> None:
    points = [point(str(n), speed, kl, spread=s / 2, error=e) for n, (speed, kl, s, e) in enumerate(drawn)]
    front = Front(4, points)
    beaten = list(front.beaten())
    assert front.best
    assert front.taken in front.best
    assert all(winner.beats(loser) for loser, winner in beaten)
    assert len(beaten) + len(front.best) == len(points)


def mismatch(kl: float) -> dict[str, object]:
    """What a document of an earlier version has."""
    return {"kl": {"k1": kl, "k3": kl}, "token_weights": {"effective": 0.9}}


def test_a_batch_needs_two_variants_with_both() -> None:
    speeds = {"bf16": {4: [1.0], 16: [3.0]}, "int8": {4: [2.0]}, "fp8": {16: [9.0]}}
    (one,) = fronts(speeds, {"bf16": mismatch(0.1), "int8": mismatch(0.2)})
    assert (one.batch, [point.name for point in one.points]) == (4, ["bf16", "int8"])
    assert one.document() == {
        "batch": 4,
        "take": "int8",
        "points": [
            {
                "rollout": name,
                "tokens_s": speed,
                "values": [speed],
                "kl": kl,
                "kl_error": 0.0,
                "effective": 0.9,
                "beaten_by": None,
            }
            for name, speed, kl in (("bf16", 1.0, 0.1), ("int8", 2.0, 0.2))
        ],
    }
    assert fronts(speeds, {"bf16": mismatch(0.1)}) == []


@pytest.mark.parametrize("base", ["bf16", "int8+kv8"])
def test_points_keep_their_order(base: str) -> None:
    document = Front(1, [PLAIN, INT8]).document()
    assert [one["rollout"] for one in document["points"]] == ["int8+plain", "int8"]
    assert [one["beaten_by"] for one in document["points"]] == ["int8", None]

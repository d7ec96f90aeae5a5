"""Sentences claim no more than repeats of the same measurement agree on."""

from __future__ import annotations

import pytest

from flashrl_cli.bench.report import sentences, speed_up

BASE = {8: [100.0, 98.0, 102.0], 256: [1000.0, 990.0, 1010.0]}


def test_a_speed_up_has_the_bounds_of_the_repeats() -> None:
    found = speed_up([150.0, 140.0, 160.0], [100.0, 90.0, 110.0])
    assert (found.value, found.least, found.greatest) == pytest.approx((1.5, 140 / 110, 160 / 90))
    assert found.text == "1.50x (1.27 to 1.78)"
    assert speed_up([150.0, 150.01], [100.0]).text == "1.50x"
    assert speed_up([1.0, 3.0], [1.0]).value == 2, "even counts take the mean of the middle"


def test_faster_at_many_and_slower_at_few_sequences() -> None:
    int8 = {8: [80.0, 81.0, 82.0], 256: [1450.0, 1440.0, 1460.0]}
    few, many = sentences({"bf16": BASE, "int8": int8}, "bf16")
    assert few == "at 8 sequences: take bf16; the closest is int8, 0.81x (0.78 to 0.84)"
    assert many == "at 256 sequences: int8 gives 1.45x (1.43 to 1.47) of bf16"


def test_what_the_repeats_do_not_tell_apart_is_not_claimed() -> None:
    (one,) = sentences({"bf16": {8: [100.0, 90.0]}, "int8": {8: [99.0, 104.0]}, "fp8": {8: [50.0, 51.0]}}, "bf16")
    assert one == (
        "at 8 sequences: what lies between bf16 and int8 is within the spread of the repeats; "
        "fp8 is slower, 0.53x (0.50 to 0.57): take bf16"
    )


def test_what_is_surely_faster_counts_beside_what_varies_more() -> None:
    found = {"bf16": {8: [100.0, 100.0]}, "int8": {8: [118.0, 122.0]}, "fp8": {8: [90.0, 190.0]}}
    (one,) = sentences(found, "bf16")
    assert one == (
        "at 8 sequences: int8 gives 1.20x (1.18 to 1.22) of bf16; fp8 as fast within the spread of the repeats"
    )


def test_rivals_of_the_fastest_are_named() -> None:
    found = {"bf16": {8: [100.0]}, "int8": {8: [150.0, 140.0]}, "fp8": {8: [148.0, 141.0]}, "x": {8: [110.0, 111.0]}}
    (one,) = sentences({**found, "bf16": {8: [100.0, 100.0]}}, "bf16")
    assert "int8 gives 1.45x (1.40 to 1.50) of bf16; fp8 as fast within the spread of the repeats" in one


def test_one_repeat_has_no_spread() -> None:
    (one,) = sentences({"bf16": {1: [100.0]}, "int8": {1: [110.0]}}, "bf16")
    assert one == "at 1 sequence: int8 1.10x, measured once each, so that small differences mean nothing"


@pytest.mark.parametrize("base", [None, "bf16"])
def test_without_anything_to_compare_with_nothing_is_said(base: str | None) -> None:
    assert list(sentences({"int8": {8: [1.0]}}, base)) == []
    assert list(sentences({"bf16": {8: [1.0]}}, base)) == []

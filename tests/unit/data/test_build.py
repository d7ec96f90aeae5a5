"""Raw rows of a split to the rows that are kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.data.prepare import TICK, Split, Unique, build_split
from flashrl_cli.data.recipes import Recipe
from flashrl_cli.data.rows import BadRow, BadRows, Place, Raw, Row, make_row


def convert(raw: Raw, split: str, index: int) -> Row:
    if raw["answer"] is None:
        raise BadRow("no answer")
    return make_row(raw.get("source", "math"), raw["prompt"], raw["answer"], {"split": split, "index": index})


def build(raws: Iterable[Raw], bad: BadRows | None = None, ticks: list[int] | None = None, **options: Any) -> Split:
    located = ((Place("f", line), raw) for line, raw in enumerate(raws, start=1))
    recipe = Recipe(splits=("train",), convert=convert, columns=("prompt", "answer", "source"))
    options = {"dedupe": True, "limit": None} | options
    advance = (ticks if ticks is not None else []).append
    return build_split("train", recipe, located, bad=bad or BadRows(), advance=advance, **options)


def raws(*pairs: tuple[str, str | None]) -> list[Raw]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]


rows = st.lists(st.builds(make_row, st.just("math"), st.sampled_from("abc"), st.sampled_from("12"), st.just({})))


@given(rows=rows)
def test_deduplication_is_idempotent_and_accounts_for_every_row(rows: list[Row]) -> None:
    unique, again = Unique(), Unique()
    kept = list(unique.keep_first((Place("f", number), one) for number, one in enumerate(rows)))
    assert list(again.keep_first(kept)) == kept
    assert again == Unique(0, 0)
    assert len(kept) + unique.duplicates == len(rows)
    assert {row["prompt"][0]["content"] for _, row in kept} == {row["prompt"][0]["content"] for row in rows}


def test_the_first_of_equal_prompts_is_kept() -> None:
    built = build(raws(("a", "1"), ("b", "2"), ("a", "1"), ("a", "3")))
    assert [(row["prompt"][0]["content"], row["extra_info"]["index"]) for row in built.rows] == [("a", 0), ("b", 1)]
    assert (built.duplicates, built.conflicts) == (2, 1)


def test_duplicates_stay_if_wanted() -> None:
    assert len(build(raws(("a", "1"), ("a", "1")), dedupe=False).rows) == 2


def test_the_limit_counts_rows_that_are_kept_and_stops_reading() -> None:
    def endless() -> Iterable[Raw]:
        yield from raws(("a", "1"), ("a", "1"), ("b", "1"))
        raise AssertionError("read on after the limit")

    assert [row["prompt"][0]["content"] for row in build(endless(), limit=2).rows] == ["a", "b"]


def test_bad_rows_are_noted_with_their_place_and_the_rest_is_read() -> None:
    bad = BadRows()
    built = build(raws(("a", None), ("b", "1"), ("c", None)), bad)
    assert len(built.rows) == 1
    assert [(problem.where, problem.message) for problem in bad.problems()] == [("f:1", "no answer; 2 rows: 1, 3")]


def test_a_data_source_without_a_reward_is_a_bad_row() -> None:
    bad = BadRows()
    build([{"prompt": "a", "answer": "1", "source": "my/set"}], bad)
    assert bad.problems()[0].message == "verl has no scorer for data_source 'my/set'"


def test_a_truth_that_its_scorer_does_not_pay_for_is_a_bad_row() -> None:
    bad = BadRows()
    build([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "x" * 300}, {"prompt": "c", "answer": "\n"}], bad)
    assert [(p.where, p.message.partition(" is ")[2][:12]) for p in bad.problems()] == [
        ("f:3", "empty"),
        ("f:2", "longer than "),
    ]


def test_what_is_not_taken_is_counted() -> None:
    built = build(
        [{"prompt": "a", "answer": "1", "images": ["x"], "level": 3}, {"prompt": "b", "answer": "1", "level": 0}]
    )
    assert built.dropped == {"images": 1, "level": 2}
    assert built.counts()["dropped"] == {"images": 1, "level": 2}


def test_progress_is_told_in_steps() -> None:
    ticks: list[int] = []
    build(raws(*[(str(n), "1") for n in range(2 * TICK + 1)]), ticks=ticks)
    assert ticks == [TICK, TICK]

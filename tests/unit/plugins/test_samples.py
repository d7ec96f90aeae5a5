"""Responses kept as text: which of a step, what is known of each, how large the files become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.plugins import samples
from flashrl_cli.plugins.samples import Sample, file_of, read, rows_to_keep, steps_in, write


def sample(step: int = 1, **changes: Any) -> Sample:
    made: dict[str, Any] = {
        "step": step, "prompt": "What is 1 plus 1?", "response": "#### 2", "ground_truth": "2", "reward": 1.0,
        "length": 6,
        "truncated": False, "advantage": 0.5, "weight": 1.01, "weight_max": 1.2, "picked": "random",
    }  # fmt: skip
    return Sample(**made | changes)


def test_the_worst_the_longest_and_others_are_kept() -> None:
    rewards = np.array([1.0, 0.0, 0.5, 1.0, 0.2, 1.0, 1.0, 1.0, 0.0])
    lengths = np.array([9, 3, 4, 5, 6, 7, 8, 2, 0])  # the last row is padding
    kept = rows_to_keep(3, 8, rewards, lengths)
    assert {row: why for row, why in kept.items() if why != "random"} == {
        1: "worst",
        4: "worst",
        0: "longest",
        6: "longest",
    }
    assert set(kept) == set(range(8))
    assert list(kept.values()).count("random") == 4


def test_no_row_is_kept_twice_and_small_batches_are_kept_whole() -> None:
    rewards, lengths = np.array([0.0, 1.0]), np.array([5, 1])
    assert set(rows_to_keep(1, 8, rewards, lengths)) == {0, 1}
    assert list(rows_to_keep(1, 1, rewards, lengths).values()) == ["random"]
    assert rows_to_keep(1, 8, np.zeros(3), np.zeros(3, int)) == {}


def test_equal_rewards_are_drawn_and_the_same_step_draws_the_same() -> None:
    rewards, lengths = np.zeros(1000), np.full(1000, 5)
    drawn = [set(rows_to_keep(step, 8, rewards, lengths)) for step in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_those_of_several_mini_batches_are_chosen_again() -> None:
    batches = [
        [sample(response=f"{batch} {row}", reward=0.1 * batch + row, length=10 * batch + row, picked=why)
         for row, why in enumerate(["worst", "worst", "longest", "longest", *["random"] * 4])]
        for batch in range(3)
    ]  # fmt: skip
    everything = [one for batch in batches for one in batch]
    assert samples.of_mini_batches(1, 8, batches[0]) == batches[0]
    found = samples.of_mini_batches(1, 8, everything)
    chosen = [(one.response, one.picked) for one in found]
    assert chosen[:4] == [("0 0", "worst"), ("1 0", "worst"), ("2 7", "longest"), ("2 6", "longest")]
    assert {picked for _, picked in chosen[4:]} == {"random"}
    assert len({response for response, _ in chosen}) == 8
    assert samples.of_mini_batches(1, 8, everything) == found


def test_a_step_is_read_back(tmp_path: Path) -> None:
    kept = [
        sample(),
        sample(response="é\u2028\x00", advantage=None, weight=None, weight_max=None, ground_truth=["a", 1]),
    ]
    write(tmp_path, 1, kept)
    assert read(file_of(tmp_path, 1)) == kept
    assert steps_in(tmp_path) == {1: file_of(tmp_path, 1)}


def test_a_truth_that_json_lacks_becomes_text(tmp_path: Path) -> None:
    write(tmp_path, 1, [sample(ground_truth=np.array([1, 2])), sample(ground_truth=object)])
    assert [one.ground_truth for one in read(file_of(tmp_path, 1))] == [[1, 2], "<class 'object'>"]


def test_the_oldest_steps_go_when_it_becomes_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, [sample()])
    size = file_of(tmp_path, 1).stat().st_size
    monkeypatch.setattr(samples, "ATTEMPT_BYTES", 3 * size)
    for step in range(2, 8):
        write(tmp_path, step, [sample(step)])
    assert list(steps_in(tmp_path)) == [5, 6, 7]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 1, "samples": [{}]}', '{"schema_version": 9}'])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    file_of(tmp_path, 1).write_text(text)
    with pytest.raises(InputError, match=r"step_000001\.json"):
        read(file_of(tmp_path, 1))


def test_a_long_text_loses_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "LONGEST_TEXT", 10)
    assert samples._shortened("0123456789") == "0123456789"
    assert samples._shortened("01234abcdefg56789") == "01234\n[… 7 characters …]\n56789"

"""Kept log-ratios on disk and in a log: which responses, how large, and what a reader refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.plugins import log_ratios
from flashrl_cli.plugins.log_ratios import Printed, Sample, file_of, printed, read, rows_to_keep, steps_in, write


def sample(step: int = 1, count: int = 3, length: int = 5) -> Sample:
    make = np.random.default_rng(step)
    return Sample(
        step=step,
        responses=9,
        log_ratios=make.normal(0, 0.1, count * length).astype(np.float16),
        lengths=np.full(count, length, np.int32),
        advantages=make.normal(size=count).astype(np.float32),
    )


def same(one: Sample, other: Sample) -> bool:
    arrays = ("log_ratios", "lengths", "advantages")
    return (one.step, one.responses) == (other.step, other.responses) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


def test_a_step_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path, sample())
    found = read(file_of(tmp_path, 1))
    assert same(found, sample())
    assert found.log_ratios.dtype == np.float16


def test_staleness_is_kept_where_there_is_some(tmp_path: Path) -> None:
    one = replace(sample(), staleness=np.array([0] * 5 + [0, 0, 1, 2, 2] + [3] * 5, np.int16))
    write(tmp_path, one)
    found = read(file_of(tmp_path, 1))
    assert found.staleness is not None
    assert one.staleness is not None
    assert found.staleness.tolist() == one.staleness.tolist()
    assert found.most_stale().tolist() == [0, 2, 3]
    assert found.chosen(np.arange(len(found.lengths)) < 2).staleness.tolist() == one.staleness.tolist()[:10]  # type: ignore[union-attr]
    both = found.joined(found.chosen(found.most_stale() == 2))
    assert (both.responses, both.lengths.tolist(), both.most_stale().tolist()) == (18, [5] * 4, [0, 2, 3, 2])
    write(tmp_path, replace(one, staleness=one.staleness[:-1]))
    with pytest.raises(InputError, match="its staleness does not fit its tokens"):
        read(file_of(tmp_path, 1))
    assert sample().most_stale().tolist() == [0, 0, 0]


def test_a_quarter_of_a_thousand_responses_are_small(tmp_path: Path) -> None:
    write(tmp_path, sample(count=256, length=200))
    assert file_of(tmp_path, 1).stat().st_size < 256 * 200 * 2 + 4096


def test_the_oldest_steps_go_where_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, sample())
    size = file_of(tmp_path, 1).stat().st_size
    monkeypatch.setattr(log_ratios, "ATTEMPT_BYTES", 3 * size + size // 2)
    for step in range(2, 12):
        write(tmp_path, sample(step))
    assert list(steps_in(tmp_path)) == [9, 10, 11]
    monkeypatch.setattr(log_ratios, "ATTEMPT_BYTES", 0)
    write(tmp_path, sample(12))
    assert list(steps_in(tmp_path)) == [12], "the newest stays"


def test_no_folder_holds_no_steps(tmp_path: Path) -> None:
    assert steps_in(tmp_path / "none") == {}
    (tmp_path / "step_x.npz").touch()
    assert steps_in(tmp_path) == {}


def test_rows_are_drawn_without_regard_to_their_length() -> None:
    lengths = np.array([0, *range(1, 1000)])
    rows = rows_to_keep(7, 500, lengths)
    assert len(set(rows.tolist())) == 500
    assert 0 not in rows, "a row without tokens is padding"
    assert rows.tolist() == rows_to_keep(7, 500, lengths).tolist() != rows_to_keep(8, 500, lengths).tolist()
    # three standard errors of the mean of 500 of 999 uniform lengths
    assert abs(lengths[rows].mean() - 500) < 3 * 288.4 / 500**0.5 * 0.5**0.5
    assert len(rows_to_keep(1, 256, np.array([5, 0]))) == 1
    assert not len(rows_to_keep(1, 256, np.zeros(4, int)))


def test_fewer_rows_are_drawn_where_responses_are_long() -> None:
    assert len(rows_to_keep(1, 256, np.full(512, log_ratios.STEP_TOKENS // 100))) == 100
    assert len(rows_to_keep(1, 256, np.full(512, 2 * log_ratios.STEP_TOKENS))) == 1


def test_printed_steps_are_written_from_the_log(tmp_path: Path) -> None:
    prefix = "(TaskRunner pid=3, ip=127.0.0.3) "
    lines = [*printed(sample(1, count=40, length=500)), "noise", *printed(sample(2))]
    assert len(lines) > 4
    assert max(map(len, lines)) < 2 * log_ratios.PART
    printed_ones = Printed(tmp_path)
    taken = [printed_ones.take(prefix + line) for line in lines for _ in range(2)]
    assert taken.count(False) == 2
    assert same(read(file_of(tmp_path, 1)), sample(1, count=40, length=500))
    assert same(read(file_of(tmp_path, 2)), sample(2))


def test_a_log_gets_no_more_than_it_should_bear(tmp_path: Path) -> None:
    large = sample(count=256, length=1000)
    lines = list(printed(large))
    assert sum(map(len, lines)) < 110_000
    for line in lines:
        Printed(tmp_path).take(line)
    whole = Printed(tmp_path)
    for line in lines:
        whole.take(line)
    found = read(file_of(tmp_path, 1))
    assert len(found.lengths) == 256 * log_ratios.PRINTED_TOKENS // 256_000
    rows = {tuple(row) for row in large.log_ratios.reshape(256, 1000).tolist()}
    assert {tuple(row) for row in found.log_ratios.reshape(-1, 1000).tolist()} <= rows, "whole responses"


def test_damaged_lines_write_nothing(tmp_path: Path) -> None:
    broken = Printed(tmp_path)
    for text in ("", "1 1", "x 1 1 AAAA", "1 1 1 A", "1 1 1 §"):
        assert broken.take(f"{log_ratios.MARK}{text}")
    assert steps_in(tmp_path) == {}


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "lengths", "infinite", "no key"])
def test_damaged_files_are_refused(damage: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, 1)
    one = sample()
    changed = {
        "lengths": {"lengths": one.lengths + 1},
        "infinite": {"log_ratios": np.full(15, np.inf, np.float16)},
        "no key": {"advantages": None},
    }
    if damage in changed:
        arrays = {name: getattr(one, name) for name in ("log_ratios", "lengths", "advantages")} | changed[damage]
        arrays = {name: value for name, value in arrays.items() if value is not None}
        np.savez(path, schema_version=1, step=1, responses=9, **arrays)
    else:
        write(tmp_path, one)
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-30], "empty": b"", "text": b"step 1"}[damage])
    with pytest.raises(InputError, match="is damaged"):
        read(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    np.savez(file_of(tmp_path, 1), schema_version=2)
    with pytest.raises(InputError, match="version 2"):
        read(file_of(tmp_path, 1))

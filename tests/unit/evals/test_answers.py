"""Answers that were written as they came, read back after their writer was killed."""

from __future__ import annotations

from pathlib import Path

from flashrl_cli.evals import results
from flashrl_cli.evals.results import Response

HARD = "a\u2028b\x85c\n\r\td \ud7ff"


def samples(question: int, count: int = 2) -> list[Response]:
    return [Response(question=question, sample=s, response=f"{HARD} {s}", tokens=3, cut=False) for s in range(count)]


def test_no_file_yet(tmp_path: Path) -> None:
    assert results.read_answers(tmp_path / "a.jsonl") == {}


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for question in (4, 0, 2):
        results.append(file, samples(question))
    assert results.read_answers(file) == {question: samples(question) for question in (4, 0, 2)}


def test_a_cut_at_any_byte_loses_the_last_question_only(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    results.append(file, samples(1))
    whole = file.read_bytes()
    results.append(file, samples(7))
    both = file.read_bytes()
    for end in range(len(whole), len(both)):
        file.write_bytes(both[:end])
        assert results.read_answers(file) == {1: samples(1)}
        assert file.read_bytes() == whole, "what comes next begins on a line of its own"
    results.append(file, samples(7))
    assert set(results.read_answers(file)) == {1, 7}

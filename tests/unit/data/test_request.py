"""What is asked for, checked as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data.prepare import requests
from flashrl_cli.errors import InputError


def test_several_sets_go_to_their_own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path))
    found = requests(["gsm8k", "arith"], limit=5, seed=3, dedupe=False)
    assert [request.paths.root for request in found] == [tmp_path / "gsm8k", tmp_path / "arith"]
    assert {(request.limit, request.seed, request.dedupe) for request in found} == {(5, 3, False)}


def test_out_is_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (request,) = requests(["gsm8k"], out="here")
    assert request.paths.root == tmp_path / "here"


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        requests(["gsm8", "tiny"], source="x", out="y", limit=1, tokenizer="z")
    told = [(problem.where, problem.message) for problem in caught.value.problems]
    assert told == [
        (None, "no data set 'gsm8'"),
        ("--out", "goes with one data set, not 2"),
        ("--source", "goes with one data set, not 2"),
        ("--source", "tiny is made here, from no source"),
        ("--limit", "tiny comes as it is, with its own tokenizer"),
        ("--tokenizer", "tiny comes as it is, with its own tokenizer"),
    ]
    assert caught.value.problems[0].hint == "did you mean gsm8k?"


@pytest.mark.parametrize("options", [{"seed": 0}, {"seed": 7}])
def test_a_seed_for_a_set_that_has_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        requests(["gsm8k"], **options)
    assert caught.value.problems[0].where == "--seed"


def test_arith_takes_no_source() -> None:
    with pytest.raises(InputError) as caught:
        requests(["arith"], source="x")
    assert caught.value.problems[0].message == "arith is made here, from no source"

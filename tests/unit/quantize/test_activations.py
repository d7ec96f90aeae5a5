"""What a model reads to be calibrated."""

from __future__ import annotations

from typing import Any

from flashrl_cli.evals.questions import Question
from flashrl_cli.quantize.calibrate import Seen, texts


def question(number: int, extra: dict[str, Any] | None = None) -> Question:
    return Question([{"role": "user", "content": f"q{number}"}], "source", number, extra)


def test_samples_are_spread_over_the_data() -> None:
    asked = [question(number) for number in range(10)]
    assert [one[0]["content"] for one in texts(asked, 4)] == ["q0", "q2", "q5", "q7"]
    assert len(texts(asked, 100)) == 10


def test_a_samples_first_token_is_left_out() -> None:
    import torch

    kept = Seen(samples=2)
    for first in (1000.0, -1000.0):
        kept.add(torch.tensor([[[first, first], [1.0, 2.0], [3.0, -4.0]]]))
    assert kept.peak.tolist() == [3, 4]
    assert kept.rows(torch.device("cpu")).tolist() == [[1, 2], [3, -4]] * 2


def test_the_solution_is_read_where_there_is_one() -> None:
    solved, empty, bare = question(1, {"answer": "1 is 1"}), question(2, {"answer": " "}), question(3)
    assert [one[-1] for one in texts([solved, empty, bare], 3)] == [
        {"role": "assistant", "content": answer} for answer in ("1 is 1", "2", "3")
    ]

"""What an engine keeps of its tokens, and when it sends them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from flashrl_cli.plugins.outputs import Keeper, merged


class Logprobs(NamedTuple):
    """vLLM's LogprobsLists, by shape."""

    ids: Any
    logprobs: Any
    ranks: Any
    offsets: Any = None


@dataclass
class Output:
    """vLLM's EngineCoreOutput, as far as it matters."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: Logprobs | None = None
    finish_reason: str | None = None
    prefill_stats: object | None = None


def keeper() -> Keeper:
    return Keeper(("finish_reason", "prefill_stats"))


def request(*stop: str) -> Any:
    return SimpleNamespace(sampling_params=SimpleNamespace(stop=list(stop)))


def step(token: int, columns: int = 1) -> Logprobs:
    return Logprobs(
        np.array([[token, *range(columns - 1)]]), np.array([[-token / 8, *[0.0] * (columns - 1)]]), np.array([token])
    )


def lists(logprobs: Logprobs | None) -> Any:
    return logprobs and [logprobs.ids.tolist(), logprobs.logprobs.tolist(), logprobs.ranks.tolist()]


@pytest.mark.parametrize("interval", [2, 3, 16])
def test_every_token_arrives_once_in_order_and_in_time(interval: int) -> None:
    draw, keep = random.Random(interval), keeper()
    lengths = {f"r{number}": draw.randrange(1, 40) for number in range(20)}
    requests = {name: request(*(["x"] * (number % 5 == 0))) for number, name in enumerate(lengths)}
    made: Counter[str] = Counter()
    found: dict[str, list[Output]] = {name: [] for name in lengths}
    while requests:
        outputs = []
        for name in list(requests):
            if draw.random() < 0.3:  # not every sequence gets a token in every step
                continue
            made[name] += 1
            token = made[name]
            first, last = token == 1, token == lengths[name]
            outputs.append(
                Output(name, [token], step(token), "length" if last else None, "prefilled" if first else None)
            )
            if (last and not (first and draw.random() < 0.5)) or last:
                del requests[name]
        for output in keep.due(outputs, requests, interval):
            found[output.request_id].append(output)
        for name in requests:
            sent = sum(len(output.new_token_ids) for output in found[name])
            assert made[name] - sent < interval, "an engine keeps fewer tokens than the interval"
    for name, length in lengths.items():
        tokens = list(range(1, length + 1))
        messages = found[name]
        assert [token for output in messages for token in output.new_token_ids] == tokens
        ranks = [output.new_logprobs.ranks.tolist() for output in messages if output.new_logprobs]
        assert [rank for some in ranks for rank in some] == tokens
        assert [output.finish_reason for output in messages] == [None] * (len(messages) - 1) + ["length"]
        assert messages[0].new_token_ids == [1], "the first token is sent at once"
        if name in {f"r{number}" for number in range(0, 20, 5)}:
            assert len(messages) == length, "a stop string is looked for in every token"
        else:
            assert len(messages) <= 2 + (length - 1) / interval


def test_log_probs_keep_the_columns_that_each_step_has() -> None:
    both = merged([step(5, columns=3), step(6)])
    assert lists(both) == [[[5], [6]], [[-0.625], [-0.75]], [5, 6]]
    assert type(both) is Logprobs
    alone = step(7, columns=2)
    assert merged([alone]) is alone
    assert merged([]) is None


def test_without_log_probs_there_are_none() -> None:
    keep, requests = keeper(), {"a": request()}
    assert not [*keep.due([Output("a", [1])], requests, 2), *keep.due([], requests, 2)]
    (sent,) = keep.due([Output("a", [2])], requests, 2)
    assert (sent.new_token_ids, sent.new_logprobs) == ([1, 2], None)


def test_what_the_engine_aborts_is_taken_and_what_the_server_aborts_is_forgotten() -> None:
    keep, requests = keeper(), {name: request() for name in "abc"}
    assert not list(keep.due([Output(name, [1], step(1)) for name in "abc"], requests, 4))
    taken = keep.take("a")
    assert taken is not None
    assert (taken.tokens, keep.take("a")) == ([1], None)
    keep.forget_all_but({"c": requests["c"]})
    assert keep.take("b") is None
    (sent,) = keep.due([Output("c", [], finish_reason="error")], {}, 4)
    assert (sent.new_token_ids, lists(sent.new_logprobs)) == ([1], [[[1]], [[-0.125]], [1]])


def test_a_step_of_several_tokens_is_kept_whole() -> None:
    """Speculative decoding."""
    keep, requests = keeper(), {"a": request()}
    several = Logprobs(np.array([[1], [2]]), np.zeros((2, 1)), np.array([1, 2]))
    assert not list(keep.due([Output("a", [1, 2], several)], requests, 3))
    (sent,) = keep.due([Output("a", [3, 4], several)], requests, 3)
    assert sent.new_token_ids == [1, 2, 3, 4]
    assert sent.new_logprobs is not None
    assert sent.new_logprobs.ranks.tolist() == [1, 2, 1, 2]

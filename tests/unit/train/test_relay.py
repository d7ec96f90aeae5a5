"""Metrics and handshakes come out of a log as verl and the plugins would have written them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from flashrl_cli import contract
from flashrl_cli.contract import HANDSHAKE_MARK, read_handshakes
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.runs.metrics import read_metrics
from flashrl_cli.train.executors.ray_job import Relay
from tests.unit.test_contract import SHAKE


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptPaths:
    return AttemptPaths(tmp_path)


def add(attempt: AttemptPaths, text: str) -> None:
    with attempt.log.open("a", encoding="utf-8") as stream:
        stream.write(text)


def told(shake: contract.Handshake) -> str:
    return HANDSHAKE_MARK + json.dumps(dataclasses.asdict(shake))


def test_steps_appear_in_the_metrics_file(attempt: AttemptPaths) -> None:
    relay = Relay(attempt)
    relay.poll()
    assert not attempt.metrics.exists()
    add(
        attempt,
        "\x1b[36m(T pid=1)\x1b[0m step:1 - critic/score/mean:0.5 - actor/grad_norm:nan\nnoise\nstep:2 - critic/sc",
    )
    relay.poll()
    add(attempt, "ore/mean:0.75")
    relay.poll()
    assert [step.step for step in read_metrics(attempt.metrics)] == [1]
    relay.poll(ended=True)
    first, second = read_metrics(attempt.metrics)
    assert (first["reward"], first.lost, second["reward"]) == (0.5, ("grad_norm",), 0.75)


def test_a_line_that_two_nodes_send_is_one_step(attempt: AttemptPaths) -> None:
    one = "step:{} - critic/score/mean:0.5\n"
    add(attempt, "(T pid=1, ip=127.0.0.3) " + one.format(1) + one.format(1) + one.format(2) + one.format(2))
    Relay(attempt).poll()
    assert [step.step for step in read_metrics(attempt.metrics)] == [1, 2]


def test_handshakes_appear_in_the_plugins_folder(attempt: AttemptPaths) -> None:
    relay = Relay(attempt)
    add(attempt, f"\x1b[36m(vLLMHttpServer pid=3, ip=127.0.0.3)\x1b[0m (Worker pid=8) {told(SHAKE)}\n")
    relay.poll()
    assert list(read_handshakes(attempt.plugins)) == [SHAKE]
    later = dataclasses.replace(SHAKE, refits=2)
    add(attempt, f"{told(later)}\n{told(dataclasses.replace(SHAKE, pid=9))}\n")
    relay.poll()
    assert [(shake.pid, shake.refits) for shake in read_handshakes(attempt.plugins)] == [(7, 2), (9, 1)]


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"schema_version": 2}', '{"schema_version": 1}', ""])
def test_what_only_looks_like_a_handshake_is_passed_over(attempt: AttemptPaths, text: str) -> None:
    add(attempt, f"{HANDSHAKE_MARK}{text}\n")
    Relay(attempt).poll()
    assert list(read_handshakes(attempt.plugins)) == []


def test_workers_tell_where_they_are_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contract.write_handshake(tmp_path, SHAKE)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(contract.ENV_TELL, "1")
    contract.write_handshake(tmp_path, SHAKE)
    assert contract.told_handshake(capsys.readouterr().out) == SHAKE

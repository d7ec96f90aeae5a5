"""verl's reward workers call the user's function: its rewards arrive in verl's form, its first failure in a report."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import contract
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.plugins import reward
from flashrl_cli.reward_function import Shipped

USERS = "/users/reward.py"
ROW = {"data_source": "mydata", "ground_truth": "5", "extra_info": {"index": 3, "num_turns": None}}


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptPaths:
    return AttemptPaths(tmp_path)


@pytest.fixture
def ship(attempt: AttemptPaths, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`ship(text, **options)` makes this process a reward worker of a run with this function."""

    def forget() -> None:
        for cached in (reward._shipped, reward._loaded, reward._calls):
            cached.cache_clear()

    def put(text: str, **options: Any) -> None:
        attempt.reward.write_text(text)
        shipped = Shipped(copy=str(attempt.reward), file=USERS, name="score", **options)
        monkeypatch.setenv(contract.ENV_REWARD, shipped.text())
        monkeypatch.setenv(contract.ENV_PLUGIN_DIR, str(attempt.plugins))
        forget()

    yield put
    forget()


def verls_call(response: str, **row: Any) -> Any:
    """What verl gets for a response (verl/experimental/reward_loop/reward_manager/naive.py:64)."""
    function = getattr(reward, contract.REWARD[1])
    result = function(solution_str=response, **ROW | row)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


@pytest.mark.parametrize(
    ("source", "result"),
    [
        ("def score(solution_str): return 0.5", {"score": 0.5, "acc": 0.0}),
        ("def score(solution_str): return 0.75", {"score": 0.75, "acc": 1.0}),
        ("def score(solution_str): return {'score': 0.1, 'acc': True, 'n': 1}", {"score": 0.1, "acc": 1.0, "n": 1}),
        ("async def score(solution_str): return 1", {"score": 1.0, "acc": 1.0}),
        ("def score(solution_str, ground_truth, extra_info): return extra_info['index'] + int(ground_truth)",
         {"score": 8.0, "acc": 1.0}),
    ],
)  # fmt: skip
def test_rewards_arrive_in_verls_form(source: str, result: dict[str, Any], ship: Callable[..., None]) -> None:
    ship(source)
    assert verls_call("x") == result


def test_arguments_and_threshold_are_the_presets(ship: Callable[..., None]) -> None:
    ship("def score(solution_str, weights, scale): return scale * sum(weights)",
         arguments={"weights": [1, 2], "scale": 0.1}, threshold=0.2)  # fmt: skip
    assert verls_call("x") == {"score": pytest.approx(0.3), "acc": 1.0}


def test_the_source_may_come_with_the_environment(
    ship: Callable[..., None], attempt: AttemptPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship("", source="def score(solution_str): return 0.25")
    attempt.reward.unlink()
    assert verls_call("x")["score"] == 0.25


def test_a_failure_is_reported_with_the_users_traceback(ship: Callable[..., None], attempt: AttemptPaths) -> None:
    ship("def score(solution_str, ground_truth):\n    return 1 / (len(solution_str) - 2)\n")
    assert verls_call("x")["score"] == -1
    assert reward.read(attempt.root) is None
    with pytest.raises(RuntimeError, match="the reward function raises ZeroDivisionError: division by zero"):
        verls_call("xy")
    report = reward.read(attempt.root)
    assert report is not None
    assert (report.what, report.line, report.file) == ("raises ZeroDivisionError: division by zero", 2, USERS)
    assert report.trace[1] == f'  File "{USERS}", line 2, in score'
    assert report.call == {"solution_str": "xy", **ROW}


def test_the_first_failure_stays(ship: Callable[..., None], attempt: AttemptPaths) -> None:
    ship("def score(solution_str): return solution_str")
    for response in ("first", "second"):
        with pytest.raises(RuntimeError, match="returns text"):
            verls_call(response)
    report = reward.read(attempt.root)
    assert report is not None
    assert report.call["solution_str"] == "first"


def test_a_file_that_a_worker_cannot_load_is_a_failure(ship: Callable[..., None], attempt: AttemptPaths) -> None:
    ship("import not_there")
    with pytest.raises(RuntimeError, match="No module named 'not_there'"):
        verls_call("x")
    assert reward.read(attempt.root)


def test_values_that_json_lacks_do_not_hide_a_failure(ship: Callable[..., None], attempt: AttemptPaths) -> None:
    import numpy as np

    ship("def score(solution_str): return None")
    with pytest.raises(RuntimeError, match="returns None"):
        verls_call("x", extra_info={"turns": np.int64(2), "scores": np.array([0.5]), "odd": object})
    report = reward.read(attempt.root)
    assert report is not None
    assert report.call["extra_info"] == {"turns": 2, "scores": [0.5], "odd": "<class 'object'>"}


@pytest.mark.parametrize("source", [
    "import time\ndef score(solution_str):\n    time.sleep(float(solution_str))\n    return 1",
    "import asyncio\nasync def score(solution_str):\n    await asyncio.sleep(float(solution_str))\n    return 1",
])  # fmt: skip
def test_a_call_that_takes_too_long_is_reported(source: str, ship: Callable[..., None], attempt: AttemptPaths) -> None:
    ship(source, timeout_s=0.2)
    thread = threading.Thread(target=lambda: _suppressed(lambda: verls_call("2")), daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while (report := reward.read(attempt.root)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert report is not None
    assert report.what == "hangs: a call takes longer than 0.2 s"
    assert report.call["solution_str"] == "2"
    if not source.startswith("import asyncio"):
        assert report.line == 3
        assert report.trace[0] == f'  File "{USERS}", line 3, in score'
    thread.join()


def _suppressed(call: Callable[[], Any]) -> None:
    try:
        call()
    except RuntimeError:
        pass


def test_a_report_is_printed_where_the_folder_is_not_shared(
    ship: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ship("def score(solution_str): return 'x'")
    monkeypatch.setenv(contract.ENV_PRINT, "1")
    with pytest.raises(RuntimeError):
        verls_call("said\nso")
    (line,) = capsys.readouterr().out.splitlines()
    found = reward.printed(f"(RewardLoopWorker pid=7) {line}")
    assert found is not None
    assert found == reward.read(tmp_path)
    assert reward.printed("a line") is None
    assert reward.printed(reward.MARK + '{"cut') is None
    assert reward.printed(reward.MARK + json.dumps({"schema_version": 99})) is None


def test_only_rows_of_its_sources_are_the_functions(ship: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    ship("def score(solution_str): return 0.25", sources=["mydata"])
    monkeypatch.setattr(reward, "_by_verl", lambda call: {"score": 1.0, "of": call.data_source})
    assert verls_call("x")["score"] == 0.25
    assert verls_call("x", data_source="openai/gsm8k") == {"score": 1.0, "of": "openai/gsm8k"}


def test_verl_finds_one_function_in_the_module() -> None:
    with pytest.raises(AttributeError):
        reward.compute_other  # noqa: B018

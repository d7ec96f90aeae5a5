"""What the lines of a run's log mean: why it failed, the exception at the root, the phase of its start, metrics on the
console.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.verl.causes import CAUSES, Cause, cause_in
from flashrl_cli.verl.logs import (
    MAX_LENGTH,
    StartPhase,
    notable,
    phase_after,
    plain,
    read_line,
    root_error,
    total_steps,
)

LOGS = Path(__file__).parent / "logs"
HEALTHY = ("healthy", "resumed", "interrupted", "two_nodes")
EXPECTED = {
    name: (cause, root)
    for name, cause, root in (row.split("\t") for row in (LOGS / "expected.tsv").read_text("utf-8").splitlines()[1:])
}
"""Log to the id of its most specific cause, and the exception at its root; `…` stands for any text, nothing for none.

A log without a heading is of a run of verl 0.9.1 with Ray 2.60 and vLLM that was made to fail; a heading says where
else a text is from.
"""


def lines_of(name: str) -> list[str]:
    return (LOGS / f"{name}.log").read_text(encoding="utf-8").splitlines()


def causes_in(name: str) -> list[Cause]:
    return [cause for line in lines_of(name) if (cause := cause_in(plain(line)))]


@pytest.mark.parametrize("name", EXPECTED)
def test_cause_and_root_of_a_log(name: str) -> None:
    cause, root = EXPECTED[name]
    found = min(causes_in(name), key=CAUSES.index, default=None)
    assert (found.id if found else "") == cause
    assert re.fullmatch(re.escape(root).replace("…", ".*"), root_error(lines_of(name)) or "")


def test_every_log_is_tested_and_every_cause_is_seen_in_one() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == set(EXPECTED)
    assert {cause.id for name in EXPECTED for cause in causes_in(name)} == {cause.id for cause in CAUSES}


def test_colours_hide_no_cause_and_the_more_specific_one_wins_within_a_line() -> None:
    assert plain("\x1b[36m(TaskRunner pid=7)\x1b[0m hello \t\n") == "(TaskRunner pid=7) hello"
    for line in (
        "\x1b[36m(WorkerDict pid=7)\x1b[0m OSError: [Errno 28] No space left on device",
        "ray.exceptions.ActorDiedError: OSError: [Errno 28] No space left on device",
    ):
        found = cause_in(plain(line))
        assert found
        assert found.id == "disk-full"


def test_only_what_verl_outlives_ends_no_run() -> None:
    outlived = {"permission", "port-taken", "package", "column", "no-scorer", "sampling"}
    assert {cause.id for cause in CAUSES if not cause.fatal} == outlived


def test_what_a_log_shows_after_the_cause_is_known_too() -> None:
    assert [cause.id for cause in causes_in("package_missing_for_ray")] == ["package", "ray-broken"] * 2


@pytest.mark.parametrize("name", EXPECTED)
def test_logs_are_short_and_of_no_machine(name: str) -> None:
    text = "\n".join(lines_of(name))
    assert len(lines_of(name)) <= (200 if name in HEALTHY else 60)
    assert "\x1b" not in text
    assert "/work/" not in text
    assert f"/{'root'}/" not in text


def test_every_cause_has_an_id_what_happened_and_what_to_do() -> None:
    assert len({cause.what for cause in CAUSES}) == len({cause.id for cause in CAUSES}) == len(CAUSES)
    assert all(cause.what and cause.hint for cause in CAUSES)
    assert not [cause.what for cause in CAUSES if "\n" in cause.what + cause.hint or cause.what.endswith(".")]


FRAME = '  File "/srv/user/reward.py", line 3, in score'
RAISED = ["Traceback (most recent call last):", FRAME, '    return row["points"]', "KeyError: 'points'"]


def test_processes_that_write_at_once_are_kept_apart() -> None:
    one = [f"\x1b[36m(Reward pid=1)\x1b[0m {line}" for line in RAISED]
    two = [f"(Worker pid=2, ip=192.0.2.1) {line}" for line in ("Loading weights", "  0%", "ready", "step:1 - loss:1")]
    mixed = [line for pair in zip(one, two, strict=True) for line in pair]
    assert root_error(mixed) == "KeyError: 'points' (/srv/user/reward.py:3)"


def test_a_death_without_an_exception_names_who_died() -> None:
    death = "Worker PID: 7 Worker exit type: SYSTEM_ERROR Worker exit detail: it was killed. It is gone."
    assert (
        root_error(["(Idle pid=77) y", "(WorkerDict pid=7, ip=192.0.2.1) x", death])
        == "WorkerDict (pid 7): it was killed"
    )
    assert root_error([death]) == "process (pid 7): it was killed"
    assert root_error([death, *RAISED]) == "KeyError: 'points' (/srv/user/reward.py:3)"


def test_what_only_follows_from_another_failure_is_passed_over() -> None:
    died = ["Traceback (most recent call last):", FRAME, "ray.exceptions.ActorDiedError: The actor died unexpectedly"]
    assert root_error([*RAISED, *died]) == "KeyError: 'points' (/srv/user/reward.py:3)"
    assert root_error(died) == "ray.exceptions.ActorDiedError: The actor died unexpectedly (/srv/user/reward.py:3)"


def test_the_last_failure_is_the_one_that_ended_the_run() -> None:
    later = ["Traceback (most recent call last):", FRAME.replace("3", "9"), "AssertionError"]
    assert root_error([*RAISED, *later]) == "AssertionError (/srv/user/reward.py:9)"


def test_words_after_a_frame_are_no_exception() -> None:
    assert root_error(["Traceback (most recent call last):", FRAME, "and then: nothing"]) is None
    assert root_error(["ValueError: said in passing"]) is None
    assert root_error([]) is None


def test_a_long_message_is_cut() -> None:
    root = root_error([*RAISED[:3], "ValueError: " + "x" * 2000])
    assert root
    assert root.endswith("… (/srv/user/reward.py:3)")
    assert len(root) == MAX_LENGTH + len(" (/srv/user/reward.py:3)")


@pytest.mark.parametrize("phase", StartPhase)
def test_phases(phase: StartPhase) -> None:
    """Each has a clock but those whose clock is that of a step."""
    for text in phase.texts:
        assert phase_after(f"(TaskRunner pid=7) {text} …", StartPhase.VERL, validates=True) is phase
    assert (phase.clock_s is None) is (phase in {StartPhase.VALIDATION, StartPhase.SAMPLING})


@pytest.mark.parametrize("name", ["healthy", "resumed", "two_nodes"])
def test_a_start_goes_through_every_phase_in_order(name: str) -> None:
    seen = [StartPhase.VERL]
    for line in lines_of(name):
        phase = phase_after(plain(line), seen[-1], validates=False)
        seen += [phase] if phase else []
    assert seen == [phase for phase in StartPhase if phase is not StartPhase.VALIDATION]


@pytest.mark.parametrize("ends", ['("Initial validation metrics: "', "Training Progress:   0%|          | 0/6"])
def test_only_a_run_that_validates_first_is_shown_to_validate(ends: str) -> None:
    begins = "(TaskRunnerV1 pid=1001) Creating file logger at /data/runs/demo/attempt_1/metrics.jsonl"
    assert phase_after(begins, StartPhase.FIRST_REFIT, validates=True) is StartPhase.VALIDATION
    assert phase_after(ends, StartPhase.VALIDATION, validates=True) is StartPhase.SAMPLING
    assert phase_after(begins, StartPhase.FIRST_REFIT, validates=False) is StartPhase.SAMPLING


def test_a_phase_does_not_come_back() -> None:
    line = "(TaskRunner pid=7) create worker group dict_keys(['actor_rollout'])"
    assert phase_after(line, StartPhase.WORKERS, validates=True) is StartPhase.POLICY
    assert phase_after(line, StartPhase.POLICY, validates=True) is None
    assert phase_after(line, StartPhase.SAMPLING, validates=True) is None


@pytest.mark.parametrize(
    ("line", "steps"), [("(TaskRunner pid=7) Total training steps: 20", 20), ("Total training steps: ?", None)]
)
def test_total_steps(line: str, steps: int | None) -> None:
    assert total_steps(line) == steps


@pytest.mark.parametrize("line", ["", "step:1 - actor/grad_norm:0.5", "Memory usage: 12 GiB", "loading the model"])
def test_ordinary_lines_mean_nothing(line: str) -> None:
    assert cause_in(line) is None
    assert phase_after(line, StartPhase.VERL, validates=True) is None
    assert total_steps(line) is None


def test_warnings_of_every_start_are_left_out_of_a_tail() -> None:
    said = [
        (
            "\x1b[36m(WorkerDict pid=1)\x1b[0m /v/verl/workers/engine/__init__.py:32: UserWarning: "
            "torchtitan engine is not available: "
            "ModuleNotFoundError(\"No module named 'torchtitan'\")"
        ),
        '\x1b[36m(WorkerDict pid=1)\x1b[0m   warnings.warn(f"torchtitan engine is not available: {e!r}", stacklevel=1)',
        "",
        "\x1b[31mValueError: it broke\x1b[0m",
    ]
    assert notable(said) == ["ValueError: it broke"]


VERLS = (
    "\x1b[36m(TaskRunnerV1 pid=9, ip=10.0.0.2)\x1b[0m step:3 - critic/score/mean:0.5 - actor/pg_loss:"
    "np.float64(0.0123) - "
    "response_length/max:np.float32(512.0) - training/num_turns/max:np.int64(2) - flag:True - x:nan - actor/lr:1e-06"
)


def test_a_line_of_verls() -> None:
    assert read_line(plain(VERLS)) == (
        3,
        {
            "critic/score/mean": 0.5,
            "actor/pg_loss": 0.0123,
            "response_length/max": 512.0,
            "training/num_turns/max": 2.0,
            "flag": 1.0,
            "x": None,
            "actor/lr": 1e-06,
        },
    )


def test_names_of_data_sets_may_hold_colons_and_slashes() -> None:
    found = read_line("step:0 - val-core/openai/gsm8k:main/acc/mean@1:np.float64(0.25)")
    assert found == (0, {"val-core/openai/gsm8k:main/acc/mean@1": 0.25})


@pytest.mark.parametrize(
    "line",
    [
        "",
        "step:3",
        "step:3 - ",
        "step:three - a:1",
        "step:3 - a",
        "step:3 - a:b",
        "step:3 - :1",
        "substep:3 - a:1",
        "global step:3 of 10 - a:1",
        "INFO step:3 - loading model",
        "Training Progress:  20%| 1/5",
    ],
)
def test_other_lines(line: str) -> None:
    assert read_line(line) is None


keys = st.from_regex(r"[a-z_]+(/[a-z_@0-9]+){0,3}", fullmatch=True)
numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(2**53), 2**53) | st.booleans()


@given(step=st.integers(0, 10**9), data=st.dictionaries(keys, numbers, min_size=1), wrap=st.booleans())
def test_what_verl_prints_is_read_back(step: int, data: dict[str, Any], wrap: bool) -> None:
    texts = {
        key: f"np.float64({value!r})" if wrap and isinstance(value, float) else repr(value)
        for key, value in data.items()
    }
    line = " - ".join([f"(TaskRunnerV1 pid=1) step:{step}", *(f"{key}:{text}" for key, text in texts.items())])
    wanted = {key: float(value) if math.isfinite(value) else None for key, value in data.items()}
    assert read_line(line) == (step, wanted)

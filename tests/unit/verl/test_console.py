"""verl's console lines read as its metrics file."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.verl.logs import plain, read_line

VERLS = (
    "\x1b[36m(TaskRunnerV1 pid=9, ip=10.0.0.2)\x1b[0m step:3 - critic/score/mean:0.5 - actor/pg_loss:np.float64(0.0123) - "
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

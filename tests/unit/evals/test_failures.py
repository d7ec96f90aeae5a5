"""What the end of an engine's log tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.evals import job
from flashrl_cli.verl.causes import CAUSES

TRACEBACK = """Traceback (most recent call last):
  File "/x/site-packages/flashrl_cli/evals/generate.py", line 7, in load
    raise ValueError("so and so")
ValueError: so and so
"""


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "--tp"),
        ("ValueError: max seq len (40960) needs 4.5 GiB, larger than the available KV cache memory", "--max-model-len"),
        ("Free memory on device cuda:0 (2.1/79.1 GiB) is less than desired GPU memory utilization", "CUDA_VISIBLE"),
    ],
)
def test_memory_is_named_with_the_option_that_helps(tmp_path: Path, line: str, option: str) -> None:
    log = tmp_path / "engine.log"
    log.write_text(f"starting\n{line}\n")
    error = job.died(1, log)
    assert option in str(error.hint)
    assert str(log) in str(error.hint)


def test_the_hints_are_for_causes_that_exist() -> None:
    assert set(job.HINTS) <= {cause.what for cause in CAUSES}


def test_any_other_exception_is_named_with_its_place(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(TRACEBACK)
    assert "ValueError: so and so (" in job.died(1, log).message
    assert "generate.py:7" in job.died(1, log).message


def test_a_log_that_tells_nothing_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("last words\n")
    assert "ended with code -9:\n  last words" in job.died(-9, log).message
    log.unlink()
    assert job.died(-9, log).message.endswith("code -9")


def test_another_process_has_its_own_name_and_hints(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n")
    error = job.died(1, log, who="the scorer", hints={"a GPU ran out of memory": "a smaller batch"})
    assert error.message == "the scorer died: a GPU ran out of memory"
    assert error.hint == f"a smaller batch; its log: {log}"
    assert job.died(1, log, who="the scorer", hints={}).message.startswith("the scorer ended with code 1")

"""What log lines mean."""

from __future__ import annotations

import pytest

from flashrl_cli.verl.log_lines import CAUSES, PHASES, cause_in, phase_after, plain, total_steps


def test_plain() -> None:
    assert plain("\x1b[36m(TaskRunner pid=7)\x1b[0m hello \t\n") == "(TaskRunner pid=7) hello"


@pytest.mark.parametrize(("text", "phase"), PHASES)
def test_phases(text: str, phase: str) -> None:
    assert phase_after(f"(TaskRunner pid=7) {text} …") == phase


@pytest.mark.parametrize(
    ("line", "steps"), [("(TaskRunner pid=7) Total training steps: 20", 20), ("Total training steps: ?", None)]
)
def test_total_steps(line: str, steps: int | None) -> None:
    assert total_steps(line) == steps


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "a GPU ran out of memory"),
        ("torch.cuda.OutOfMemoryError: no", "a GPU ran out of memory"),
        ("ray.exceptions.OutOfMemoryError: Task was killed", "the machine ran out of memory"),
        ("numpy: Unable to allocate 3 GiB", "the machine ran out of memory"),
        ("OSError: [Errno 28] No space left on device", "a disk is full"),
        (
            "ValueError: No available memory for the cache blocks.",
            "the rollout engine has no memory left for its KV cache",
        ),
        ("OSError: We couldn't connect to 'https://huggingface.co'", "the model could not be loaded"),
        ("RuntimeError: [Errno 98] Address already in use", "a network port is taken"),
        ("RuntimeError: Engine core initialization failed.", "the rollout engine did not start"),
        ("ERROR Worker proc VllmWorker-0 died unexpectedly", "a worker of the rollout engine died"),
        ("vllm.v1.engine.exceptions.EngineDeadError: …", "a worker of the rollout engine died"),
        ("ray.exceptions.ActorDiedError: The actor died", "a Ray worker died"),
    ],
)
def test_causes(line: str, what: str) -> None:
    found = cause_in(line)
    assert found
    assert found.what == what
    assert found.hint


@pytest.mark.parametrize("line", ["", "step:1 - actor/grad_norm:0.5", "Memory usage: 12 GiB", "loading the model"])
def test_ordinary_lines_mean_nothing(line: str) -> None:
    assert cause_in(line) is None
    assert phase_after(line) is None
    assert total_steps(line) is None


def test_the_more_specific_cause_wins_within_a_line() -> None:
    found = cause_in("ray.exceptions.ActorDiedError: OSError: No space left on device")
    assert found
    assert found.what == "a disk is full"
    assert len({cause.what for cause in CAUSES}) == len(CAUSES)

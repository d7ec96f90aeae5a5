"""An engine that goes to sleep on a GPU that other processes use, too: vLLM's own code, with the GPU's memory given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flashrl_cli.plugins import vllm_plugin

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("free", [(5, 3), (3, 5)])
def test_an_engine_goes_to_sleep_while_others_take_memory(
    monkeypatch: pytest.MonkeyPatch, free: tuple[int, int]
) -> None:
    import torch
    from vllm.v1.worker.gpu_worker import Worker

    slept: list[int] = []
    worker = SimpleNamespace(_get_sleep_mode_backend=lambda: SimpleNamespace(suspend=slept.append))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    memory = iter([(free[0] << 30, 9 << 30), (free[1] << 30, 9 << 30)] * 2)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: next(memory))
    original = Worker.sleep
    monkeypatch.setattr(Worker, "sleep", original)
    if free[1] < free[0]:
        with pytest.raises(AssertionError, match="increased after sleeping"):
            Worker.sleep(worker, 1)
    vllm_plugin.sleep_beside_others()
    once = Worker.sleep
    vllm_plugin.sleep_beside_others()
    assert Worker.sleep is once is not original
    slept.clear()
    Worker.sleep(worker, 1)
    assert slept == [1]


def test_another_failure_of_an_engine_that_goes_to_sleep_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    def sleep(self: Worker, level: int = 1) -> None:
        raise AssertionError(level)

    monkeypatch.setattr(Worker, "sleep", sleep)
    vllm_plugin.sleep_beside_others()
    with pytest.raises(AssertionError, match="2"):
        Worker.sleep(SimpleNamespace(), 2)

"""GPUs with room are taken, others left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.evals import request
from flashrl_cli.evals.job import EngineSettings
from flashrl_cli.evals.request import Device

ANSWER = "0, 81559, 2000\n1, 81559, 81000\n2, 81559, 40000\nUnable to determine the device handle\n3, [N/A], 5\n"
FOUND = [Device(0, 81559, 2000), Device(1, 81559, 81000), Device(2, 81559, 40000)]


def test_the_answer_of_nvidia_smi_is_read() -> None:
    assert request.parse(ANSWER) == FOUND


def test_the_freest_is_taken_with_the_usual_share() -> None:
    assert request.freest(EngineSettings(), FOUND) == (EngineSettings(gpu_memory_utilization=0.9), "1")


def test_several_are_limited_by_the_fullest_of_them() -> None:
    engine, visible = request.freest(EngineSettings(tensor_parallel=2), FOUND)
    assert visible == "1,2"
    assert engine.gpu_memory_utilization == pytest.approx(40000 / 81559 - 0.03, abs=0.01)


def test_a_share_that_was_asked_for_stays() -> None:
    asked = EngineSettings(gpu_memory_utilization=0.2)
    assert request.freest(asked, FOUND)[0] == asked


def test_no_room_and_too_few() -> None:
    with pytest.raises(EnvironmentNotReady, match=r"0: 2\.0 GiB"):
        request.freest(EngineSettings(), FOUND[:1])
    with pytest.raises(EnvironmentNotReady, match="this machine has 3 GPUs"):
        request.freest(EngineSettings(tensor_parallel=4), FOUND)


def test_what_the_user_chose_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert request.choose_devices(EngineSettings()) == (EngineSettings(), None)


def test_without_gpus_there_is_no_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert request.choose_devices(EngineSettings()) == (EngineSettings(), None)

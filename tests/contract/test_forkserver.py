"""What the fork server of a run on GPUs answers to modules that ask for one while they are imported."""

from __future__ import annotations

import pytest

from flashrl_cli.machine import gpus
from flashrl_cli.plugins import forkserver


def test_capabilities_come_from_nvidia_smi_until_the_imports_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    seen = [gpus.Gpu("NVIDIA H200", (9, 0), "580.1", 143771), gpus.Gpu("NVIDIA A100", (8, 0), "580.1", 81920)]
    monkeypatch.setattr(gpus, "seen", lambda: seen)
    original = torch.cuda.get_device_capability
    with forkserver.capabilities_by_nvidia_smi():
        ask = torch.cuda.get_device_capability
        assert ask() == ask(0) == ask("cuda") == ask(torch.device("cuda:0")) == (9, 0)
        assert ask(1) == ask("cuda:1") == ask(torch.device("cuda", 1)) == (8, 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        from verl.plugin.platform.platform_cuda import PlatformCUDA

        assert PlatformCUDA().get_device_capability(1) == (8, 0)
        assert not torch.cuda.is_initialized()
    assert torch.cuda.get_device_capability is original

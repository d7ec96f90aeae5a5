"""What the fork server of a run knows of verl's modules and Ray: GPUs asked for while importing, and random ids."""

from __future__ import annotations

import subprocess
import sys

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


DECLARED = """
import sys
from flashrl_cli.plugins import forkserver
if sys.argv[1] == "kept":
    forkserver.draw_class_ids_from_the_system()
    forkserver.draw_class_ids_from_the_system()
import ray
assert not forkserver.ray_is_seeded()
@ray.remote
class One:
    pass
@ray.remote(max_concurrency=2)
class Two:
    async def call(self):
        pass
ids = {kind.__ray_metadata__.class_id for kind in (One, Two)}
print(forkserver.ray_is_seeded(), len(ids), {len(one.binary()) for one in ids})
if sys.argv[1] == "drawn":
    forkserver.preload(("colorsys",))
"""


@pytest.mark.parametrize(("how", "seeded", "code"), [("kept", False, 0), ("drawn", True, 1)])
def test_forks_do_not_draw_the_same_ids_from_ray(how: str, seeded: bool, code: int) -> None:
    """Without the patch of Ray they would: then the server ends, and all processes start as usual."""
    done = subprocess.run([sys.executable, "-c", DECLARED, how], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(seeded), "2", "{28}"], done.stderr
    assert done.returncode == code
    assert ("importing colorsys draws Ray's random numbers" in done.stderr) is seeded


def test_what_a_run_imports_draws_no_id_from_ray() -> None:
    text = (
        "from flashrl_cli.plugins import forkserver as f; f.prepare_for_run(); f.preload(f.MODULES); print('seedless')"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert "seedless" in done.stdout, done.stderr

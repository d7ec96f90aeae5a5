"""New weights for an evaluation engine, read from an HF folder: one engine serves every checkpoint of an architecture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flashrl_cli.plugins.refit import Load, describe, refit


class FolderRefitExtension:
    """vLLM worker extension (`worker_extension_cls`) that reloads weights from disk."""

    def load_folder(self, path: str) -> dict[str, Any]:
        """Refit the engine with all `*.safetensors` of the HF folder `path`; returns what it now holds (a Handshake)."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        device = getattr(self, "device", None) or torch.device("cpu")
        model_config = runner.vllm_config.model_config
        seconds = refit(runner.model, model_config, device, lambda load: _stream(load, Path(path)))
        return asdict(describe(runner.model, device=device, refits=1, refit_s=seconds))


def _stream(load: Load, folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            load((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118 - no mapping, it has no items()

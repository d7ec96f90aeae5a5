"""Transfer of weights from the trainer to the rollout engine in bf16 instead of float32."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from flashrl_cli.contract import PATCHED, VERL

_READERS = ("verl.utils.model", "verl.workers.engine.fsdp.transformer_impl")
"""The modules with the function: the one that defines it and the one that imports it by name."""


class InBf16(Mapping[str, Any]):
    """A state dict that casts each float32 tensor to bf16 on access, shard by shard on the trainer's device."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Any:
        import torch
        from verl.utils.device import get_device_id

        weight = self._weights[name]
        if weight.dtype != torch.float32:
            return weight
        return weight.to(get_device_id(), non_blocking=True).to(torch.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def send_bf16() -> None:
    """Halve the bytes that a weight update gathers among GPUs and sends to the engine (idempotent).

    verl gathers and sends the trainer's float32 weights unchanged, because some weights of mixtures of experts must
    stay in float32 (verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py:127). A dense model's engine casts
    every weight to bf16, and so does flashrl before it quantizes (plugins/linear.py). The state dict passes through
    `convert_weight_keys` just before it is gathered (verl/workers/engine/fsdp/transformer_impl.py:1018). Raises
    RuntimeError for a verl other than 0.9.1.
    """
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl sends weights in bf16 with verl {VERL} only")
    import verl.utils.model

    original = verl.utils.model.convert_weight_keys
    if getattr(original, PATCHED, False):
        return

    def convert_weight_keys(state_dict: Mapping[str, Any], model: Any) -> InBf16:
        return InBf16(original(state_dict, model))

    setattr(convert_weight_keys, PATCHED, True)
    for name in _READERS:
        if module := sys.modules.get(name):
            vars(module)["convert_weight_keys"] = convert_weight_keys

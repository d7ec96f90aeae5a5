"""LoRA adapters added to the matrices of their base: W + alpha / r * B @ A in float32.

The formula is that of arXiv 2106.09685, section 4.1. Adapters are read as PEFT writes them (adapter_config.json,
adapter_model.safetensors), or as verl does: the state dict of the wrapped model in shards, and lora_train_meta.json.
Anything else in an adapter is refused by name, not ignored.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flashrl_cli.weights.contents import Unreadable, read_json
from flashrl_cli.weights.reading import Source, Stored, in_bf16, is_finite

VERL_META = "lora_train_meta.json"
"""File with the rank and alpha of LoRA shards (verl/utils/checkpoint/fsdp_checkpoint_manager.py:129)."""
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
_HARMLESS = frozenset({
    "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode",
    "peft_version", "auto_mapping", "megatron_core", "runtime_config", "qalora_group_size", "eva_config", "bias",
    "init_lora_weights",
})  # fmt: skip
"""Settings of PEFT that are applied here, or that do not affect how the two matrices change a weight."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Adapter initializations that change the base's weights, too (peft/tuners/lora/layer.py, reset_lora_parameters)."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The factor of an adapter's matrices, their rank, and whether weights are stored transposed."""

    folder: Path
    rank: int
    scale: float
    transposed: bool

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """The adapter that `folder` describes. Raises Unreadable naming a setting that cannot be applied."""
        peft = folder / PEFT_CONFIG
        file = peft if peft.is_file() else folder / VERL_META
        config = read_json(file)
        if refused := sorted(_refused(config)):
            raise Unreadable(f"{file} asks for what cannot be merged: {', '.join(refused)}")
        try:
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
        except (KeyError, TypeError, ValueError):
            rank, alpha = 0, math.nan
        if rank < 1 or not math.isfinite(alpha):
            raise Unreadable(
                f"{file} names no rank and alpha: r is {config.get('r')}, lora_alpha {config.get('lora_alpha')}"
            )
        if not alpha:
            raise Unreadable(
                f"{file} has lora_alpha 0: the adapter changes nothing; write the alpha that it was trained with"
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return cls(folder, rank, scale, bool(config.get("fan_in_fan_out")))

    def add(self, whole: Source, lora: Source) -> Source:
        """`whole` in bf16, with the products of `lora` added. Raises Unreadable for a matrix without a base weight."""
        pairs: dict[str, dict[str, Stored]] = {}
        for name, matrix in lora.items():
            match = _MATRIX.fullmatch(name)
            if not match:
                raise Unreadable(f"{self.folder} holds {name}, which cannot be merged")
            pairs.setdefault(f"{match['module']}.weight", {})[match["side"]] = matrix
        if not pairs:
            raise Unreadable(f"{self.folder} holds no matrices of an adapter")
        for name, pair in pairs.items():
            if name not in whole or len(pair) != 2:
                raise Unreadable(f"{self.folder} holds no pair of matrices for a weight that is there: {name}")
        changed = {
            name: replace(whole[name], dtype="BF16", read=partial(self._added, name, whole[name], **pair), parts=None)
            for name, pair in pairs.items()
        }
        return in_bf16(whole) | changed

    def _added(self, name: str, whole: Stored, A: Stored, B: Stored) -> Any:  # noqa: N803
        weight, down, up = (stored.read().float() for stored in (whole, A, B))
        for side, matrix in (("A", down), ("B", up)):
            if not is_finite(matrix):
                raise Unreadable(f"{self.folder}: lora_{side} of {name} holds NaN or infinite values")
        delta = up @ down if down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] == self.rank else None
        if delta is not None and self.transposed:
            delta = delta.T
        if delta is None or delta.shape != weight.shape:
            shapes = f"{tuple(up.shape)} by {tuple(down.shape)}"
            raise Unreadable(f"{self.folder}: {shapes} of rank {self.rank} does not fit {name} {tuple(weight.shape)}")
        return delta.mul_(self.scale).add_(weight).bfloat16()


def is_lora(name: str) -> bool:
    """Whether a tensor belongs to an adapter (verl/utils/checkpoint/checkpoint_manager.py:112)."""
    return "lora_" in name or ".adapter_" in name


def unwrapped(name: str) -> str:
    """A tensor's name in the model before PEFT wrapped it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _refused(config: dict[str, Any]) -> set[str]:
    refused = {key for key, value in config.items() if value and key not in _HARMLESS}
    if config.get("bias") not in {None, "none"}:
        refused.add("bias")
    if config.get("peft_type") not in {None, "LORA"}:
        refused.add(f"peft_type {config['peft_type']}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        refused.add(f"init_lora_weights {start}")
    return refused

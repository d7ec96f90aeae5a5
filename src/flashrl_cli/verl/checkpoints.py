"""verl's checkpoint layout: its folder and file names, and what a run's overrides say about its validation data.

Written by verl 0.9.1, one step by utils/checkpoint/fsdp_checkpoint_manager.py:272-476, a run by
trainer/ppo/v1/trainer_base.py:948-1029.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
"""Number of the last step that was saved completely; verl writes it last."""
ACTOR = "actor"
CRITIC = "critic"
HUGGINGFACE = "huggingface"
"""Folder in `actor/` with config and tokenizer, and with merged weights only if the run saved them too."""
LORA = "lora_train_meta.json"

_STEP = re.compile(r"global_step_(\d+)")
_SHARD = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_FSDP_CONFIG = "fsdp_config.json"
_VAL_FILES = "data.val_files"


@dataclass(frozen=True, slots=True)
class Shards:
    """The model shards of one `actor/`, in order of rank; `missing` names those that are absent or empty."""

    files: tuple[Path, ...]
    missing: tuple[str, ...]


def step_number(name: str) -> int | None:
    """Step of a folder called `name`, or None if it is no step."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def tracked_step(run: Path) -> int | None:
    """Last step that the run's tracker names as complete; None without a readable tracker."""
    try:
        return int((run / TRACKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def latest_step(run: Path) -> Path | None:
    """Folder of the step that verl resumes from by itself; None where it starts anew."""
    step = tracked_step(run)
    folder = run / f"global_step_{step}"
    return folder if step is not None and folder.is_dir() else None


def shards(actor: Path) -> Shards | None:
    """Shards that belong to `actor`; None if it has none at all."""
    world_size = max((int(m[1]) for m in map(_SHARD.fullmatch, _names(actor)) if m), default=None)
    if world_size is None:
        return None
    world_size = _recorded_world_size(actor) or world_size
    files = tuple(actor / f"model_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size))
    return Shards(files, tuple(f.name for f in files if not f.is_file() or not f.stat().st_size))


def val_files(overrides: Iterable[str]) -> list[Path]:
    """Validation parquet files among a plan's overrides (`key=value` in Hydra's grammar); empty if none are named."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for text in overrides:
        if text.lstrip("+").startswith(f"{_VAL_FILES}="):
            value = parser.parse_override(text).value()
            return [Path(v) for v in (value if isinstance(value, list) else [value])]
    return []


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def _recorded_world_size(actor: Path) -> int | None:
    try:
        return int(json.loads((actor / _FSDP_CONFIG).read_text(encoding="utf-8"))["world_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

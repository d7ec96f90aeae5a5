"""verl's checkpoint layout, and what a run's overrides mean for its checkpoints and its validation data.

The layout is that of verl 0.9.1. utils/checkpoint/fsdp_checkpoint_manager.py:272-476 writes the files of one model;
trainer/ppo/v1/trainer_base.py:948-1029 writes a step: actor, critic, data.pt, in asynchronous modes the transfer
queue, and the run's tracker last. transfer_queue/interface.py:1004 writes the queue into a folder that it renames when
it is complete: prompts whose responses are unfinished, which are sampled anew, and finished responses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrl_cli.verl.overrides import MODE
from flashrl_cli.weights import VERL_META

TRACKER = "latest_checkpointed_iteration.txt"
"""File with the number of the last step that was saved completely; verl writes it last."""
ACTOR = "actor"
CRITIC = "critic"
HUGGINGFACE = "huggingface"
"""Folder in `actor/` with configuration and tokenizer; it has merged weights only if the run saved them too."""
STEP_HUGGINGFACE = "actor_huggingface"
"""Folder in a step's folder into which the original FlashRL project merged its weights."""
HF_FILES = ("config.json", "tokenizer_config.json")
"""Files that a Hugging Face folder has at least."""
LORA = VERL_META
DATA = "data.pt"
"""State of the data loader; verl writes it after the models, so a step without it was not saved completely."""
QUEUE = "transfer_queue"
"""Folder in a step's folder with what asynchronous modes have sampled ahead."""
STORAGE_UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
DEFAULT_STORAGE_UNITS = 8
"""Storage units of verl's own configuration."""
_QUEUE_TEXTS = ("metadata.json", "simple_storage/storage_unit_info.json")
FSDP_CONFIG = "fsdp_config.json"
PARTS = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
"""The parts of a checkpoint by verl's names (in `save_contents`, `load_contents`): the start of their files' names."""

_STEP = re.compile(r"global_step_(\d+)")
_SHARD = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_VAL_FILES = "data.val_files"
_TRAIN_FILES = "data.train_files"
_MODEL = "actor_rollout_ref.model.path"
_CONTENTS = {
    ACTOR: "actor_rollout_ref.actor.checkpoint",
    CRITIC: "critic.checkpoint",
}


@dataclass(frozen=True, slots=True)
class Shards:
    """The model shards of one `actor/`, in order of rank; `missing` names those that are absent or empty."""

    files: tuple[Path, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The parts (keys of PARTS) that a resume reads of each model's checkpoint; `queue`: and what was sampled ahead."""

    actor: frozenset[str] = frozenset(PARTS)
    critic: frozenset[str] = frozenset(PARTS)
    queue: bool = False


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"global_step_{step}"


def step_number(name: str) -> int | None:
    """Step number in a folder's name; None if the folder is not that of a step."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def tracked_step(run: Path) -> int | None:
    """Last step that the run's tracker names as complete; None without a readable tracker."""
    try:
        return int((run / TRACKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def shards(actor: Path) -> Shards | None:
    """Model shards of the checkpoint in `actor`; None if it has none at all."""
    world_size = max((int(m[1]) for m in map(_SHARD.fullmatch, _names(actor)) if m), default=None)
    if world_size is None:
        return None
    files = tuple(part_files(actor, recorded_world_size(actor) or world_size, ["model"]))
    return Shards(files, tuple(f.name for f in files if not f.is_file() or not f.stat().st_size))


def recorded_world_size(model: Path) -> int | None:
    """Number of processes that saved `model` (an `actor/` or `critic/`), as verl recorded it beside the shards.

    None without a readable record.
    """
    try:
        world_size = int(json.loads((model / FSDP_CONFIG).read_text(encoding="utf-8"))["world_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return world_size if world_size > 0 else None


def part_files(model: Path, world_size: int, parts: Iterable[str]) -> list[Path]:
    """Files of `parts` (keys of PARTS) in `model`, each part in order of rank."""
    return [
        model / f"{PARTS[part]}_world_size_{world_size}_rank_{rank}.pt" for part in parts for rank in range(world_size)
    ]


def queue_texts(step_folder: Path) -> list[Path]:
    """JSON files of a step's queue, the list of its storage units last."""
    return [step_folder / QUEUE / name for name in _QUEUE_TEXTS]


def queue_pickles(step_folder: Path) -> list[Path] | None:
    """Pickles of a step's queue, of its controller and of each storage unit; None without a readable list of them."""
    folder, units = step_folder / QUEUE, _units(step_folder)
    if units is None:
        return None
    return [folder / "controller_state.pkl", *(folder / "simple_storage" / name for name in units)]


def saved_units(step_folder: Path) -> int | None:
    """Number of storage units that saved a step's queue; None without a readable list of them."""
    units = _units(step_folder)
    return None if units is None else len(units)


def _units(step_folder: Path) -> list[str] | None:
    try:
        listed = json.loads((step_folder / QUEUE / _QUEUE_TEXTS[-1]).read_text(encoding="utf-8"))
        return [f"su_{unit['position']}_{unit['storage_unit_id']}.pkl" for unit in listed]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def storage_units(verl: Mapping[str, Any]) -> int:
    """Storage units of the transfer queue of a run whose preset has these verl keys."""
    found = verl.get(STORAGE_UNITS, verl.get(f"+{STORAGE_UNITS}"))
    return found if isinstance(found, int) else DEFAULT_STORAGE_UNITS


def loaded(overrides: Iterable[str]) -> Loaded:
    """Parts that a run with these overrides (`key=value` in Hydra's grammar) loads when it resumes.

    Without `load_contents` a run loads what it saves (verl/trainer/config/actor/actor.yaml:139).
    """
    given = list(overrides)
    return _loaded(lambda key: _given(given, key), queue=_given(given, MODE) not in (None, "sync"))


def loaded_by(verl: Mapping[str, Any], mode: str = "sync") -> Loaded:
    """Parts that a run in this mode whose preset has these verl keys loads when it resumes; see `loaded`."""
    return _loaded(lambda key: verl.get(key, verl.get(f"+{key}")), queue=mode != "sync")


def _loaded(value_of: Callable[[str], Any], *, queue: bool) -> Loaded:
    parts = {}
    for model, key in _CONTENTS.items():
        named = (value_of(f"{key}.{name}") for name in ("load_contents", "save_contents"))
        contents = next((value for value in named if isinstance(value, list)), PARTS)
        parts[model] = frozenset(PARTS) & frozenset(map(str, contents))
    return Loaded(**parts, queue=queue)


def val_files(overrides: Iterable[str]) -> list[Path]:
    """Validation parquet files among a plan's overrides (`key=value` in Hydra's grammar); empty if none are named."""
    return _files(_given(overrides, _VAL_FILES))


def data_files(overrides: Iterable[str]) -> list[Path]:
    """Training and validation files among a plan's overrides."""
    given = list(overrides)
    return [*_files(_given(given, _TRAIN_FILES)), *_files(_given(given, _VAL_FILES))]


def _files(value: Any) -> list[Path]:
    return [] if value is None else [Path(v) for v in (value if isinstance(value, list) else [value])]


def model_path(overrides: Iterable[str]) -> str | None:
    """The policy that a run with these overrides starts from, a folder or a hub id; None if they name none."""
    value = _given(overrides, _MODEL)
    return None if value is None else str(value)


def _given(overrides: Iterable[str], key: str) -> Any:
    """Value of `key` among overrides, the last one if it is given several times; None if it is not given."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = [text for text in overrides if text.lstrip("+").startswith(f"{key}=")]
    return OverridesParser.create().parse_override(found[-1]).value() if found else None


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]

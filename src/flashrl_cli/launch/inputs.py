"""What a run reads from this machine: data files, model folders and a smoothing profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.verl.overrides import data_path, model_path
from flashrl_cli.verl.platform import rollout_options

if TYPE_CHECKING:
    from flashrl_cli.config.spec import RunSpec

PROFILE = "rollout.profile"


def local_inputs(spec: RunSpec, data_root: Path) -> dict[str, Path]:
    """Spec keys to the files and folders that they name on this machine; a hub id names none."""
    named = {
        "data.train": data_path("train")(spec.data.train, data_root),
        "data.val": data_path("test")(spec.data.val, data_root),
        "model.path": model_path(spec.model.path, data_root),
    }
    if spec.algorithm.advantage == "gae" and spec.critic.path:
        named["critic.path"] = model_path(spec.critic.path, data_root)
    if profile := rollout_options(spec.rollout).profile:
        named[PROFILE] = profile
    return {key: Path(path) for key, path in named.items() if path.startswith("/")}


def vocabulary(spec: RunSpec, data_root: Path) -> int | None:
    """Rows of the policy's embedding, from its config.json; None for a policy that is not on this machine."""
    folder = local_inputs(spec, data_root).get("model.path")
    try:
        size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"] if folder else None
    except (OSError, ValueError, KeyError):
        return None
    return size if isinstance(size, int) else None

"""`flashrl prepare tiny`: data and policy of the embedded default, made here from nothing but a seed."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from flashrl_cli import __version__, cpu, files
from flashrl_cli.data import arith, writing
from flashrl_cli.data.stamps import stamp, unchanged
from flashrl_cli.data.tiny_policy import save, warm_up

if TYPE_CHECKING:
    from flashrl_cli.data.request import Talk
    from flashrl_cli.paths import DatasetPaths

WEIGHTS = "model.safetensors"


def prepare_tiny(paths: DatasetPaths, *, seed: int, force: bool, output: Talk) -> dict[str, Any]:
    """Make `arith` rows and a warmed-up policy in `paths`, unless they lie there already; returns status and manifest.

    Takes about a minute on two cores. RunFailed if the policy cannot be taught.
    """
    there = writing.read_manifest(paths)
    if not force and there is not None and _up_to_date(paths, there, seed):
        return {"status": "up to date", **there}
    output.say("tiny: teaching a policy of 0.4 M parameters to add …")
    for key, value in cpu.THREADS.items():
        os.environ.setdefault(key, value)
    model, tokenizer, taught = warm_up(seed=seed, report=output.say)
    with files.replacing(paths.model) as folder:
        save(model, tokenizer, folder)
        weights = stamp(folder / WEIGHTS, name=f"{paths.model.name}/{WEIGHTS}")
        if paths.model.exists():
            shutil.rmtree(paths.model)
    rows = {
        split: [arith.row({"a": a, "b": b}, split, index) for index, (a, b) in enumerate(drawn)]
        for split, drawn in arith.pairs(seed).items()
    }
    about = {"source": None, "options": {"seed": seed}, "tokenizer": None, "model": {**taught, "weights": weights}}
    manifest = writing.write_dataset(paths, rows, about, {split: {} for split in rows})
    return {"status": "prepared", **manifest}


def _up_to_date(paths: DatasetPaths, manifest: writing.Manifest, seed: int) -> bool:
    same = manifest.get("flashrl") == __version__ and manifest["options"] == {"seed": seed} and "model" in manifest
    return (
        same
        and unchanged(paths.model / WEIGHTS, manifest["model"]["weights"])
        and all((paths.model / name).is_file() for name in ("config.json", "tokenizer.json"))
        and writing.outputs_unchanged(paths, manifest)
    )

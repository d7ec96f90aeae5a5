"""The shape of a model, found offline: in its folder, the Hugging Face cache, or a table of common models."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from flashrl_cli.hub import hub_cache
from flashrl_cli.verl.overrides import model_path
from flashrl_cli.weights.shape import ModelShape, of_config

SIZES = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
QWEN25 = {
    "0.5B": (896, 24, 14, 2, 64, 4864, 151936),
    "1.5B": (1536, 28, 12, 2, 128, 8960, 151936),
    "3B": (2048, 36, 16, 2, 128, 11008, 151936),
    "7B": (3584, 28, 28, 4, 128, 18944, 152064),
    "14B": (5120, 48, 40, 8, 128, 13824, 152064),
    "32B": (5120, 64, 40, 8, 128, 27648, 152064),
    "72B": (8192, 80, 64, 8, 128, 29568, 152064),
}
"""`SIZES` of Qwen2.5 (arXiv 2412.15115, table 1), as in the config.json files on the hub."""
QWEN25_TIED = {"0.5B", "1.5B", "3B"}
QWEN25_SHORT = {"0.5B", "3B"}
"""Base models with a context of 32k; the other base models have 128k, and all instruct models 32k."""
QWEN3 = {
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936),
    "1.7B": (2048, 28, 16, 8, 128, 6144, 151936),
    "4B": (2560, 36, 32, 8, 128, 9728, 151936),
    "8B": (4096, 36, 32, 8, 128, 12288, 151936),
    "14B": (5120, 40, 40, 8, 128, 17408, 151936),
    "32B": (5120, 64, 64, 8, 128, 25600, 151936),
    "30B-A3B": (2048, 48, 32, 4, 128, 6144, 151936),
}
"""`SIZES` of Qwen3 (arXiv 2505.09388, tables 1 and 2), as in the config.json files on the hub."""
QWEN3_TIED = {"0.6B", "1.7B", "4B"}
LLAMA32 = {"1B": (2048, 16, 32, 8, 64, 8192, 128256), "3B": (3072, 28, 24, 8, 128, 8192, 128256)}
"""`SIZES` of the text models of Llama 3.2, as in the config.json files on the hub; all of them tie embeddings."""


def shape_of(reference: str, data_root: Path) -> ModelShape | None:
    """Shape of a model on this machine: `prepared:NAME`, a folder or a Hugging Face id; None if it is unknown here.

    Raises ValueError if the config.json does not describe a plain decoder.
    """
    path = model_path(reference, data_root)
    if path.startswith("/"):
        return _read(Path(path) / "config.json")
    return _read(_cached(path)) or _table().get(path)


def _read(file: Path | None) -> ModelShape | None:
    """Shape from a config.json; None if it is missing or cannot be read."""
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError):
        return None
    return of_config(config) if isinstance(config, dict) else None


def _cached(model: str) -> Path | None:
    """config.json of the main revision in the Hugging Face cache, whose layout is documented and stable."""
    folder = hub_cache(os.environ, Path.home()) / f"models--{model.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return folder / "snapshots" / revision / "config.json"


@cache
def _table() -> dict[str, ModelShape]:
    """Shapes of the table's models, by Hugging Face id."""
    return {**_qwen25(), **_qwen3(), **_llama32()}


def _qwen25() -> dict[str, ModelShape]:
    found = {}
    for size, row in QWEN25.items():
        base = 32768 if size in QWEN25_SHORT else 131072
        for suffix, positions in (("", base), ("-Instruct", 32768)):
            found[f"Qwen/Qwen2.5-{size}{suffix}"] = _qwen2(row, positions, tied=size in QWEN25_TIED)
    for size in ("1.5B", "7B", "72B"):
        for suffix in ("", "-Instruct"):
            found[f"Qwen/Qwen2.5-Math-{size}{suffix}"] = _qwen2(QWEN25[size], 4096, tied=size in QWEN25_TIED)
    return found


def _qwen2(row: tuple[int, ...], positions: int, *, tied: bool) -> ModelShape:
    sizes: dict[str, Any] = dict(zip(SIZES, row, strict=True))
    return ModelShape(architecture="qwen2", max_positions=positions, tied=tied, qkv_bias=True, **sizes)


def _qwen3() -> dict[str, ModelShape]:
    found = {}
    for size, row in QWEN3.items():
        for suffix, positions in (("", 40960), ("-Base", 32768)):
            found[f"Qwen/Qwen3-{size}{suffix}"] = _qwen3_shape(row, positions, tied=size in QWEN3_TIED, size=size)
    return found


def _qwen3_shape(row: tuple[int, ...], positions: int, *, tied: bool, size: str) -> ModelShape:
    sizes: dict[str, Any] = dict(zip(SIZES, row, strict=True))
    if size == "30B-A3B":
        sizes |= {"experts": 128, "experts_per_token": 8, "expert_intermediate": 768}
    kind = "qwen3_moe" if "experts" in sizes else "qwen3"
    return ModelShape(architecture=kind, max_positions=positions, tied=tied, qk_norm=True, **sizes)


def _llama32() -> dict[str, ModelShape]:
    found: dict[str, ModelShape] = {}
    for size, row in LLAMA32.items():
        sizes: dict[str, Any] = dict(zip(SIZES, row, strict=True))
        shape = ModelShape(architecture="llama", max_positions=131072, tied=True, **sizes)
        found |= {f"meta-llama/Llama-3.2-{size}{suffix}": shape for suffix in ("", "-Instruct")}
    return found

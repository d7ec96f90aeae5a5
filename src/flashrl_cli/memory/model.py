"""Where a model's shape comes from without a network: its folder, the Hugging Face cache, or a table of common models.

The numbers of a Hugging Face config.json that decide how large a decoder is, and its parameter counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flashrl_cli.hub import hub_cache
from flashrl_cli.verl.overrides import model_path

REQUIRED = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}
"""Attributes of a shape and the fields of config.json without which there is none."""
UNSUPPORTED = ("text_config", "kv_lora_rank", "linear_num_value_heads", "ssm_state_size", "num_nextn_predict_layers")
"""Fields of models that are no plain decoder (images, latent or linear attention): a guess would be far off."""
GEMMA = {"gemma": 2, "gemma2": 4, "gemma3_text": 4}
"""Norms a layer of the architectures whose embeddings are tied unless config.json says otherwise."""
QK_NORM = {"qwen3", "qwen3_moe", "gemma3_text"}
QKV_BIAS = {"qwen2", "qwen2_moe"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder: sizes in elements, `intermediate` of the dense MLP, `expert_intermediate` of one expert."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    max_positions: int
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    """Of the expert that sees every token (qwen2_moe); 0 for none."""
    dense_layers: int = 0
    """Layers of a mixture-of-experts model that have a dense MLP instead."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_dim

    @property
    def expert_layers(self) -> int:
        """Layers whose MLP is a mixture of experts."""
        return self.layers - self.dense_layers if self.experts else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Parameter counts of a whole model; `head` is 0 where it is tied to the embeddings."""

    embeddings: int
    linear: int
    """Weights of attention and dense MLPs: what rollouts quantize."""
    experts: int
    other: int
    """Norms, biases, routers."""
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embeddings + self.linear + self.experts + self.other + self.head


def of_config(config: Mapping[str, Any]) -> ModelShape:
    """Shape of a model from its config.json; an unknown architecture with the usual fields counts as a Llama.

    Raises ValueError that names the fields which are missing, or which make the model something else.
    """
    kind = str(config.get("model_type", "unknown"))
    if strange := [field for field in UNSUPPORTED if config.get(field)]:
        raise ValueError(f"a {kind} model with {', '.join(strange)} is no plain decoder")
    size = {name: _number(config, field) for name, field in REQUIRED.items()}
    if missing := [field for name, field in REQUIRED.items() if size[name] is None]:
        raise ValueError(f"config.json of a {kind} model lacks {', '.join(missing)}")
    known = {name: value for name, value in size.items() if value is not None}
    bias = bool(config.get("attention_bias"))
    return ModelShape(
        architecture=kind,
        **known,
        kv_heads=_number(config, "num_key_value_heads") or known["heads"],
        head_dim=_number(config, "head_dim") or known["hidden"] // known["heads"],
        tied=bool(config.get("tie_word_embeddings", kind in GEMMA)),
        qkv_bias=bias or kind in QKV_BIAS,
        output_bias=bias and kind not in QKV_BIAS,
        qk_norm=kind in QK_NORM,
        norms_per_layer=GEMMA.get(kind, 2),
        **_mixture(config, known["layers"]),
    )


def _number(config: Mapping[str, Any], field: str) -> int | None:
    value = config.get(field)
    return value if isinstance(value, int) and value > 0 else None


def _mixture(config: Mapping[str, Any], layers: int) -> dict[str, int]:
    """Fields of a mixture of experts, under Qwen's or Mixtral's names; empty for a dense model."""
    experts = _number(config, "num_experts") or _number(config, "num_local_experts")
    if not experts:
        return {}
    step = _number(config, "decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    return {
        "experts": experts,
        "experts_per_token": _number(config, "num_experts_per_tok") or 1,
        "expert_intermediate": _number(config, "moe_intermediate_size") or _number(config, "intermediate_size") or 0,
        "shared_intermediate": _number(config, "shared_expert_intermediate_size") or 0,
        "dense_layers": sum(1 for layer in range(layers) if layer in dense or (layer + 1) % step),
    }


def parameters(shape: ModelShape) -> Parameters:
    """Parameter counts of the model. A gated MLP has three matrices, attention four."""
    table = shape.vocab * shape.hidden
    attention = 2 * shape.hidden * (shape.query_size + shape.kv_size)
    dense = shape.layers - shape.expert_layers
    mlp = 3 * shape.hidden * (dense * shape.intermediate + shape.expert_layers * shape.shared_intermediate)
    return Parameters(
        embeddings=table,
        linear=shape.layers * attention + mlp,
        experts=_experts(shape),
        other=_other(shape),
        head=0 if shape.tied else table,
    )


def _experts(shape: ModelShape) -> int:
    return shape.expert_layers * shape.experts * 3 * shape.hidden * shape.expert_intermediate


def _other(shape: ModelShape) -> int:
    layer = shape.norms_per_layer * shape.hidden
    layer += (shape.query_size + 2 * shape.kv_size) if shape.qkv_bias else 0
    layer += shape.hidden if shape.output_bias else 0
    layer += 2 * shape.head_dim if shape.qk_norm else 0
    router = shape.expert_layers * shape.hidden * (shape.experts + bool(shape.shared_intermediate))
    return shape.layers * layer + router + shape.hidden


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
"""Base models with a context of 32k; the others' is 128k, that of all instruct models is 32k."""
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


def shape_of(reference: str, data_root: Path) -> ModelShape | None:
    """Shape of `prepared:NAME`, a folder or a Hugging Face id, from this machine alone; None where nothing here tells.

    Raises ValueError when a config.json was found and is no plain decoder's.
    """
    path = model_path(reference, data_root)
    if path.startswith("/"):
        return _read(Path(path) / "config.json")
    return _read(_cached(path)) or _table().get(path)


def _read(file: Path | None) -> ModelShape | None:
    """Shape from a config.json; None where there is none, or none that can be read."""
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
    """Shapes by Hugging Face id."""
    return {**_qwen25(), **_qwen3()}


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

"""The model that is measured: one on disk or on the hub, or the shape of a known one with random weights."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files, paths
from flashrl_cli.errors import InputError
from flashrl_cli.fit.known import QWEN25, shape_of
from flashrl_cli.runs.checkpoints import hf_folder
from flashrl_cli.weights import Unreadable, Weights, read_json

if TYPE_CHECKING:
    from flashrl_cli.fit.shape import ModelShape

SHAPE = "shape:"
SHAPES = tuple(name.lower() for name in QWEN25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """`config` is its config.json; `hf` its folder, None for a shape. `fingerprint` changes with anything that is measured of it."""

    name: str
    config: dict[str, Any]
    hf: Path | None
    fingerprint: str

    @property
    def weights(self) -> Weights | None:
        """Its weights on disk; None for a shape."""
        return Weights(hf=self.hf) if self.hf else None

    @property
    def layers(self) -> int:
        """Its layers; 0 if its config does not say."""
        return int(self.config.get("num_hidden_layers") or 0)

    @property
    def positions(self) -> int | None:
        """Longest sequence that it knows, in tokens; None if its config does not say."""
        found = self.config.get("max_position_embeddings")
        return int(found) if found else None

    def folder(self, work: Path) -> Path:
        """Its HF folder; for a shape one with a config alone is made in `work`."""
        if self.hf:
            return self.hf
        made = work / "model"
        files.write_json(made / "config.json", self.config)
        return made


def find(reference: str) -> Model:
    """The model that `--model` names. Raises InputError if it is none that can be measured."""
    if reference.startswith(SHAPE):
        config = config_of(_shape(reference.removeprefix(SHAPE)))
        return Model(name=reference, config=config, hf=None, fingerprint=_hash(config))
    found = hf_folder(reference)
    if found.shards or found.adapter:
        raise InputError(f"{reference} is no whole HF model", hint="flashrl runs export writes one; measure that")
    if found.quantized:
        hint = "name the model that it was made of: bench quantizes it as a rollout does"
        raise InputError(f"{reference} is quantized already ({found.quantized})", hint=hint)
    try:
        config, fingerprint = read_json(found.hf / "config.json"), found.weights.fingerprint()
        found.weights.accounted()
    except Unreadable as error:
        raise InputError(f"--model {reference} cannot be read: {error}") from None
    return Model(name=reference, config=config, hf=found.hf, fingerprint=fingerprint)


def _shape(text: str) -> ModelShape:
    """The shape `7b`, or of its first layers, `7b/4`."""
    name, slash, layers = text.partition("/")
    if name.lower() not in SHAPES:
        near = difflib.get_close_matches(name.lower(), SHAPES, n=1)
        hint = f"did you mean shape:{near[0]}?" if near else f"there are {', '.join(SHAPE + one for one in SHAPES)}"
        raise InputError(f"--model {SHAPE}{text}: no shape {name!r}", hint=hint)
    found = shape_of(f"Qwen/Qwen2.5-{name.upper()}", paths.data_root())
    if found is None:
        raise InputError(f"--model {SHAPE}{text}: its config.json in the hub's cache is no plain decoder's")
    if not slash:
        return found
    if not layers.isdecimal() or not 1 <= int(layers) <= found.layers:
        raise InputError(f"--model {SHAPE}{text}: {name} has 1 to {found.layers} layers", hint=f"{SHAPE}{name}/4")
    return replace(found, layers=int(layers))


def config_of(shape: ModelShape) -> dict[str, Any]:
    """config.json of a Qwen2.5 with this shape."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

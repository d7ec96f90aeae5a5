"""The tensors that an architecture has, by its config alone: Transformers builds the model without memory.

Building costs some milliseconds, and importing torch and Transformers three to five seconds. So what was built is kept
in the user's cache, under the config and the version of Transformers: an architecture that was seen before costs
neither.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from flashrl_cli.weights.contents import read_json

Shapes = dict[str, tuple[int, ...]]
_FORMAT = 1
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "attn_implementation"})
"""Keys of config.json that change no tensor's name or shape."""
_PREFIX_OPTIONAL = frozenset({"gpt2", "bloom"})
"""Families whose published weights lack the body's prefix, which readers add (vllm/model_executor/models/gpt2.py)."""
_OLD_BUFFERS = r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
"""Buffers that older versions of Transformers saved, and that every reader computes for itself."""
_NOT_BUILT = (
    ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, RuntimeError, AssertionError, ZeroDivisionError,
)  # fmt: skip
"""What Transformers raises for a config that it makes no model of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Names and shapes of a model's tensors, in each form that its weights are saved in (experts fused or one by one).

    `optional` are names that may lack, because they are tied to others; `ignored` are patterns of names that no reader
    looks at; `integers` are names of the few tensors that hold no floating-point numbers.
    """

    forms: tuple[Shapes, ...]
    optional: frozenset[str]
    ignored: tuple[str, ...]
    integers: frozenset[str]

    def form(self, found: Mapping[str, object]) -> Shapes:
        """The form that has the most names in common with the tensors that are there."""
        return max(self.forms, key=lambda form: len(form.keys() & found.keys()))

    def ignores(self, name: str) -> bool:
        """Whether a tensor may be there that the model does not have."""
        return any(re.search(pattern, name) for pattern in self.ignored)

    def text(self) -> str:
        """The same as JSON."""
        return json.dumps(
            {
                "forms": self.forms,
                "optional": sorted(self.optional),
                "ignored": self.ignored,
                "integers": sorted(self.integers),
            }
        )

    @classmethod
    def of(cls, text: str) -> Expected:
        """What `text` made. Raises ValueError, KeyError or TypeError for anything else."""
        data = json.loads(text)
        return cls(
            forms=tuple({name: tuple(shape) for name, shape in form.items()} for form in data["forms"]),
            optional=frozenset(data["optional"]),
            ignored=tuple(data["ignored"]),
            integers=frozenset(data["integers"]),
        )


def expected(hf: Path) -> Expected | None:
    """What the config of an HF folder asks for; None where the architecture is unknown or the weights are quantized.

    No code of the folder's is run. Raises Unreadable for a config that cannot be read.
    """
    config = read_json(hf / "config.json")
    if "quantization_config" in config or not config.get("model_type"):
        return None
    asked = {key: value for key, value in config.items() if key not in _VOLATILE}
    return _of_config(json.dumps(asked, sort_keys=True))


@functools.lru_cache(maxsize=32)
def _of_config(text: str) -> Expected | None:
    kept = _cache(text)
    try:
        return Expected.of(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        built = _built(json.loads(text))
    if built:
        _keep(kept, built.text())
    return built


def _cache(text: str) -> Path:
    """File in which what this config makes is kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made_by = json.dumps([_FORMAT, metadata.version("transformers"), text])
    return root / "flashrl" / "architectures" / f"{hashlib.sha256(made_by.encode()).hexdigest()[:24]}.json"


def _keep(file: Path, text: str) -> None:
    """Write the cache, whole or not at all; one that cannot be written costs time, and nothing else."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False, encoding="utf-8") as out:
            out.write(text)
        os.replace(out.name, file)
    except OSError:
        return


def _built(config: dict[str, Any]) -> Expected | None:
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.core_model_loading import revert_weight_conversion

    try:
        found = _quietly(transformers.AutoConfig.for_model, **config)
        found._attn_implementation = "eager"  # the trainer's may not be installed here
        kind = _class(transformers, found)
        if kind is None:
            return None
        with torch.device("meta"):
            model = _quietly(kind, found)
        states = model.state_dict()
        saved = revert_weight_conversion(model, dict(states))
    except (*_NOT_BUILT, StrictDataclassError):
        return None
    forms = [_shapes(states), _shapes(saved)]
    if found.model_type in _PREFIX_OPTIONAL:
        prefix = f"{model.base_model_prefix}."
        forms.append({name.removeprefix(prefix): shape for name, shape in forms[0].items()})
    return Expected(
        forms=tuple(form for number, form in enumerate(forms) if form not in forms[:number]),
        optional=frozenset(model.all_tied_weights_keys),
        ignored=(_OLD_BUFFERS, *sorted(set(_ignored(model)))),
        integers=frozenset(name for name, one in states.items() if not one.is_floating_point()),
    )


def _quietly(make: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What a function of Transformers makes, without its remarks on the config."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return make(*given, **named)
    finally:
        logging.set_verbosity(before)


def _class(transformers: Any, config: Any) -> Any:
    """The model's class: the one that its config names, else its family's causal language model; None if unknown."""
    named = (getattr(config, "architectures", None) or [None])[0]
    if named:
        return getattr(transformers, named, None)
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _shapes(tensors: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _ignored(model: Any) -> Iterator[str]:
    """Patterns of names that the model, or a part of it, leaves unread."""
    for module in model.modules():
        yield from getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()

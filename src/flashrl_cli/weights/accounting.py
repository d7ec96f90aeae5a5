"""Check that a checkpoint holds what its architecture expects, by names, shapes and dtypes, without reading tensors.

All commands that read weights use one rule: each tensor of the architecture is present with its shape and in floating
point, and there are no others. All problems are reported at once, by tensor and file. Names that a wrapper changed are
refused with the fix rather than renamed, because the folder would stay unreadable for every other tool.

Transformers builds the architecture from its config without memory for weights. That takes some milliseconds, but
importing torch and Transformers takes three to five seconds. So the result is stored in the user's cache, by the config
and the version of Transformers, and a known architecture needs no import.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from flashrl_cli.text import counted
from flashrl_cli.weights.contents import INDEX, Unreadable, is_missing, read_json, table
from flashrl_cli.weights.reading import FLOATS, Stored

Shapes = dict[str, tuple[int, ...]]
_FORMAT = 1
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "attn_implementation"})
"""Keys of config.json that affect no tensor's name or shape."""
_PREFIX_OPTIONAL = frozenset({"gpt2", "bloom"})
"""Families whose published weights lack the body's prefix, which readers add (vllm/model_executor/models/gpt2.py)."""
_OLD_BUFFERS = r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
"""Buffers that older versions of Transformers saved, and that every reader computes itself."""
_NOT_BUILT = (
    ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, RuntimeError, AssertionError,
    ZeroDivisionError,
)  # fmt: skip
"""Exceptions that Transformers raises for a config from which it cannot build a model."""
WRAPPERS = {
    "_orig_mod.": "as torch.compile leaves them: save the model's _orig_mod",
    "module.": "as DistributedDataParallel leaves them: save the model's module",
    "base_model.model.": "as PEFT leaves them: save the model after merge_and_unload()",
}
"""Prefixes that a wrapper puts before all names, and the fix for each."""
_PART = re.compile(r".*-\d+-of-(\d+)\.safetensors")
_LISTED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Names and shapes of a model's tensors, in each form in which they are saved (experts fused or one by one).

    `optional` are names that may be missing, because they are tied to others; `ignored` are patterns of names that no
    reader uses; `integers` are names of the few tensors that hold no floating-point numbers.
    """

    forms: tuple[Shapes, ...]
    optional: frozenset[str]
    ignored: tuple[str, ...]
    integers: frozenset[str]

    def form(self, found: Mapping[str, object]) -> Shapes:
        """The form that has the most names in common with the tensors that were found."""
        return max(self.forms, key=lambda form: len(form.keys() & found.keys()))

    def ignores(self, name: str) -> bool:
        """Whether a tensor may be present although the model does not have it."""
        return any(re.search(pattern, name) for pattern in self.ignored)

    def text(self) -> str:
        """The expected tensors as JSON."""
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
        """The expected tensors from the JSON of `text`. Raises ValueError, KeyError or TypeError for anything else."""
        data = json.loads(text)
        return cls(
            forms=tuple({name: tuple(shape) for name, shape in form.items()} for form in data["forms"]),
            optional=frozenset(data["optional"]),
            ignored=tuple(data["ignored"]),
            integers=frozenset(data["integers"]),
        )


def expected(hf: Path) -> Expected | None:
    """The tensors that an HF folder's config implies; None if the architecture is unknown or the weights are quantized.

    No code in the folder is run. Raises Unreadable for a config that cannot be read.
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
    """Cache file of the architecture that this config describes."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made_by = json.dumps([_FORMAT, metadata.version("transformers"), text])
    return root / "flashrl" / "architectures" / f"{hashlib.sha256(made_by.encode()).hexdigest()[:24]}.json"


def _keep(file: Path, text: str) -> None:
    """Write the cache file atomically; a failure to write it only costs time, and is ignored."""
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
        found._attn_implementation = "eager"  # the trainer's attention may not be installed here
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
    """The result of a function of Transformers, without its warnings about the config."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return make(*given, **named)
    finally:
        logging.set_verbosity(before)


def _class(transformers: Any, config: Any) -> Any:
    """The model's class: the one that its config names, or else its family's causal language model; None if unknown."""
    named = (getattr(config, "architectures", None) or [None])[0]
    if named:
        return getattr(transformers, named, None)
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _shapes(tensors: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _ignored(model: Any) -> Iterator[str]:
    """Patterns of names that the model or one of its parts ignores."""
    for module in model.modules():
        yield from getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()


Found = Mapping[str, Stored]


def account(hf: Path, found: Found, expected: Expected | None) -> None:
    """Compare the tensors that were found with those of the architecture.

    Raises Unreadable naming all tensors that are missing, unexpected or empty, or have another shape or kind of number.
    If the architecture is unknown (`expected` is None), only wrappers and empty tensors are detected.
    """
    problems = list(_wrapped(found, expected)) or [
        *_empty(found),
        *(_compared(hf, found, expected) if expected else ()),
    ]
    if problems:
        raise Unreadable("; ".join(problems))


def index_problems(hf: Path) -> list[str]:
    """Disagreements between an index and the files that it names; empty without an index. Raises Unreadable."""
    if not (hf / INDEX).is_file():
        return []
    try:
        named: dict[str, str] = {**read_json(hf / INDEX)["weight_map"]}
        files = sorted(set(named.values()))
        missing = [file for file in files if is_missing(hf / file)]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Unreadable(f"{hf / INDEX} is damaged") from None
    problems = [f"{file}, which {INDEX} names, is missing" for file in missing]
    parts = {match[1] for match in map(_PART.fullmatch, files) if match}
    if len(parts) == 1 and len(files) < (count := int(parts.pop())):
        problems.append(f"{INDEX} names {len(files)} of {count} files")
    for file in files:
        if file not in missing:
            problems += _index_and_file(file, {name for name in named if named[name] == file}, set(table(hf / file)[0]))
    return problems


def _index_and_file(file: str, named: set[str], there: set[str]) -> Iterator[str]:
    if absent := sorted(named - there):
        yield f"{file} lacks what {INDEX} says is in it: {some(absent)}"
    if unnamed := sorted(there - named):
        yield f"{file} holds what {INDEX} does not place in it: {some(unnamed)}"


def _wrapped(found: Found, expected: Expected | None) -> Iterator[str]:
    """Yield the prefix of a wrapper that all names share, unless the architecture has it."""
    for prefix, fix in WRAPPERS.items():
        named = [name for name in found if name.startswith(prefix)]
        if named and len(named) == len(found) and not (expected and expected.form(found).keys() & found.keys()):
            yield f"all tensors are named {prefix}…, {fix}, or rename them"


def _empty(found: Found) -> Iterator[str]:
    empty = sorted(name for name, one in found.items() if not math.prod(one.shape))
    if empty:
        what = counted(len(empty), "tensor is", "tensors are")
        why = "as DeepSpeed's ZeRO-3 leaves what it did not gather before saving"
        yield f"{what} empty, {why}: {_placed(empty, found)}"


def _compared(hf: Path, found: Found, expected: Expected) -> Iterator[str]:
    wanted = expected.form(found)
    missing = sorted(wanted.keys() - found.keys() - expected.optional)
    if missing:
        yield f"missing {counted(len(missing), 'tensor')}: {some(missing)}{_elsewhere(hf, missing)}"
    unknown = sorted(name for name in found.keys() - wanted.keys() if not expected.ignores(name))
    if unknown:
        yield f"{counted(len(unknown), 'tensor')} that the architecture does not have: {_placed(unknown, found)}"
    shared = sorted(wanted.keys() & found.keys())
    yield from _misshapen([name for name in shared if math.prod(found[name].shape)], found, wanted)
    integers = [name for name in shared if found[name].dtype not in FLOATS and name not in expected.integers]
    if integers:
        kinds = ", ".join(sorted({found[name].dtype for name in integers}))
        yield f"{counted(len(integers), 'tensor')} in {kinds} and not in floating point: {_placed(integers, found)}"


def _misshapen(names: Sequence[str], found: Found, wanted: Shapes) -> Iterator[str]:
    wrong = [name for name in names if found[name].shape != wanted[name]]
    shown = [f"{_in_file(name, found)} {list(found[name].shape)}, not {list(wanted[name])}" for name in wrong[:_LISTED]]
    if wrong:
        yield f"other shapes than config.json asks for: {', '.join(shown)}{_more(wrong)}"


def _elsewhere(hf: Path, missing: Sequence[str]) -> str:
    """A note on a safetensors file of the folder that holds missing tensors but is in no index."""
    for file in sorted(hf.glob("*.safetensors")):
        try:
            if set(missing) & table(file)[0].keys():
                return f" (in {file.name}, which {INDEX} does not name)"
        except Unreadable:
            continue
    return ""


def not_finite(names: Sequence[str], files: Mapping[str, Path | None]) -> Unreadable:
    """The error for tensors that hold NaN or infinite values."""
    placed = [_named(name, files.get(name)) for name in names[:_LISTED]]
    return Unreadable(f"{counted(len(names), 'tensor')} with NaN or infinite values: {', '.join(placed)}{_more(names)}")


def some(names: Sequence[str]) -> str:
    """The first names of a list, and the number of the others."""
    return ", ".join(names[:_LISTED]) + _more(names)


def _placed(names: Sequence[str], found: Found) -> str:
    return ", ".join(_in_file(name, found) for name in names[:_LISTED]) + _more(names)


def _in_file(name: str, found: Found) -> str:
    return _named(name, found[name].file)


def _named(name: str, file: Path | None) -> str:
    return f"{name} (in {file.name})" if file else name


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""

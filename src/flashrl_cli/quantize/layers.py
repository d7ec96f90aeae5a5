"""Find the linear layers of a model to quantize, and those that can be scaled against each other, by their names.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, section 4): column j of a weight is multiplied by s_j, and channel j of
its input divided by it. The division is free if a tensor produces that channel alone: the weight of a norm, the rows of
v_proj (attention mixes positions, not channels) and of up_proj (the activation of gate_proj is multiplied by its
output). The model's output does not change.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashrl_cli.errors import InputError, Problem
from flashrl_cli.text import counted

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose layers have the names and connections that `_layer` assumes
(transformers/models/*/modeling_*.py).
"""
Shapes = Mapping[str, Sequence[int]]
HEAD = "lm_head"
PATTERN = "re:"
"""Prefix of an entry of `ignore` that is a regular expression, which is matched from the start of a name
(compressed_tensors/utils/match.py).
"""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Layers that vLLM joins into one (`packed_modules_mapping` of its models), so that they need the same scheme."""
TILE = 16
"""Both sizes of a weight must be a multiple of it for vLLM's CUTLASS kernels (vllm/_custom_ops.py:850 in 0.24,
cutlass_scaled_mm).
"""
EXPERTS_HINT = "--ignore 're:.*experts.*'"
_WEIGHT = ".weight"
_IN_LAYER = re.compile(r"(^|\.)\d+\.")
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_LISTED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Junction:
    """A place in a model where scales can be moved from one tensor to others.

    `readers` are linear modules with one common input [K], `makers` are tensors of K rows that produce it. With
    `copies` above 1, that many query heads read each of `heads` key-value heads, and makers have K / copies rows.
    """

    readers: tuple[str, ...]
    makers: tuple[str, ...]
    heads: int = 1
    copies: int = 1


def junctions(config: Mapping[str, Any], shapes: Shapes) -> list[Junction]:
    """All junctions of a model, found by its config.json and the shapes of its tensors.

    Raises InputError for a family with unknown connections, a quantized model, or norms with a bias.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(
            f"smoothing is not known for model_type {family}", hint=f"known are {known}; quantize without it"
        )
    if "quantization_config" in config:
        raise InputError("the model is quantized already", hint="calibrate the model that it was made of")
    if shifted := sorted(name for name in shapes if name.endswith("norm.bias")):
        raise InputError(f"a norm with a bias cannot take up scales: {shifted[0]}", hint="quantize without smoothing")
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    layers = range(int(config["num_hidden_layers"]))
    return [junction for layer in layers for junction in _layer(f"model.layers.{layer}", shapes, kv_heads, heads)]


def _layer(layer: str, shapes: Shapes, kv_heads: int, heads: int) -> Iterator[Junction]:
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    yield Junction(
        readers=tuple(f"{attention}.{one}_proj" for one in "qkv"),
        makers=(f"{layer}.input_layernorm.weight",),
    )
    yield Junction(
        readers=(f"{attention}.o_proj",),
        makers=_rows(f"{attention}.v_proj", shapes),
        heads=kv_heads,
        copies=heads // kv_heads,
    )
    yield Junction(
        readers=(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        makers=(f"{layer}.post_attention_layernorm.weight",),
    )
    yield Junction(readers=(f"{mlp}.down_proj",), makers=_rows(f"{mlp}.up_proj", shapes))


def _rows(module: str, shapes: Shapes) -> tuple[str, ...]:
    """Weight of a linear module, and its bias if it has one."""
    return tuple(name for name in (f"{module}.weight", f"{module}.bias") if name in shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Modules to quantize, linear modules that stay in 16 bits, and the corresponding `ignore` entries of config.json.

    `odd` are quantized modules whose shape CUTLASS does not support; `experts` are those among the modules that stay.
    """

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    ignore: tuple[str, ...]
    odd: tuple[str, ...]
    experts: tuple[str, ...]


def choose(shapes: Shapes, ignore: Sequence[str]) -> Choice:
    """Decide which of a model's tensors are quantized. `ignore` holds names of layers and `re:` patterns.

    Raises InputError for an entry that is not a valid pattern or matches nothing, for experts that it does not cover,
    for layers that vLLM joins and of which it covers only some, and for a model without linear layers.
    """
    patterns = {entry: _pattern(entry) for entry in ignore}
    modules = [name.removesuffix(_WEIGHT) for name in shapes if is_matrix(name, shapes[name])]
    ignored = {module for module in (*modules, *_experts(shapes)) if any(p.match(module) for p in patterns.values())}
    _refuse_useless(patterns, [*modules, *_experts(shapes), HEAD])
    experts = _experts(shapes)
    _refuse_experts([module for module in experts if module not in ignored])
    quantized = [module for module in modules if module not in ignored and _is_layer(module)]
    _refuse_halves(quantized, modules)
    if not quantized:
        raise InputError("no linear layer to quantize", hint="name a language model's folder, or ignore fewer layers")
    kept = sorted({*modules, *experts} - set(quantized))
    unmatched = [module for module in kept if module not in ignored and module != HEAD]
    return Choice(
        quantized=tuple(quantized),
        kept=tuple(kept),
        ignore=(HEAD, *(entry for entry in ignore if entry != HEAD), *unmatched),
        odd=tuple(module for module in quantized if any(size % TILE for size in shapes[module + _WEIGHT])),
        experts=tuple(experts),
    )


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the weight [N, K] of a linear module, excluding embeddings and experts."""
    module = name.removesuffix(_WEIGHT)
    last = module.rsplit(".", 1)[-1]
    embeds = "emb" in last or last in {"wte", "wpe"}
    return name.endswith(_WEIGHT) and len(shape) == 2 and not embeds and not is_expert(name)


def _is_layer(module: str) -> bool:
    """Whether a linear module belongs to a numbered layer and is not a router, whose output selects experts."""
    last = module.rsplit(".", 1)[-1]
    return bool(_IN_LAYER.search(module)) and last not in _ROUTERS and ".router." not in module


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to the experts of a mixture."""
    return ".experts." in name


def _experts(shapes: Shapes) -> list[str]:
    """Modules, or fused tensors, that hold the matrices of experts."""
    return [name.removesuffix(_WEIGHT) for name in shapes if is_expert(name) and len(shapes[name]) > 1]


def _pattern(entry: str) -> re.Pattern[str]:
    """The regular expression for the names that an entry of `ignore` means. Raises InputError."""
    if not entry.startswith(PATTERN):
        return re.compile(re.escape(entry) + r"\Z")
    try:
        return re.compile(entry.removeprefix(PATTERN))
    except re.error as error:
        raise InputError(f"--ignore {entry}: no regular expression ({error})", hint="quote it: 're:.*mlp.*'") from None


def _refuse_useless(patterns: Mapping[str, re.Pattern[str]], modules: Sequence[str]) -> None:
    """Refuse patterns without a match: they are probably typing errors, and the intended layer would be quantized."""
    problems = []
    for entry, pattern in patterns.items():
        if not any(map(pattern.match, modules)):
            close = difflib.get_close_matches(entry, modules, n=1)
            problems.append(Problem(f"--ignore {entry} matches no layer", hint=f"meant: {close[0]}" if close else None))
    if problems:
        example = next(iter(modules))
        raise InputError("layers to ignore that are not there", problems=problems, hint=f"a layer is called {example}")


def _refuse_experts(experts: Sequence[str]) -> None:
    if experts:
        matrices = counted(len(experts), "matrix", "matrices")
        what = f"{matrices} of experts, {_some(experts)}: only dense layers are quantized here"
        raise InputError(what, hint=f"{EXPERTS_HINT} leaves them in 16 bits")


def _refuse_halves(quantized: Iterable[str], modules: Iterable[str]) -> None:
    found, there = set(quantized), set(modules)
    for group in _groups(there):
        states = {module in found for module in group}
        if len(states) > 1:
            names = " and ".join(sorted(group))
            hint = "ignore all of them or none"
            raise InputError(f"vLLM joins {names} into one layer, which cannot be in two precisions", hint=hint)


def _groups(modules: set[str]) -> Iterator[list[str]]:
    for parts in FUSED:
        parents = sorted({module.rpartition(".")[0] for module in modules if module.rpartition(".")[2] == parts[0]})
        yield from ([f"{parent}.{part}" for part in parts if f"{parent}.{part}" in modules] for parent in parents)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more

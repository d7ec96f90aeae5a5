"""Which attention the trainer's models have where `model.attention` is `auto`, and what `varlen` cannot do.

`varlen` is flashrl's own name for the kernel of torch.nn.attention.varlen (plugins/attention.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flashrl_cli.config.layers import Origin
from flashrl_cli.precision import Capabilities
from flashrl_cli.verl.config import ROLES
from flashrl_cli.verl.overrides import AUTO, Places, overrides, verbatim_keys

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.weights.shape import ModelShape

FIELD = "model.attention"
FLASH, VARLEN, SDPA = "flash_attention_2", "varlen", "sdpa"
GPUS = Capabilities((8, 0))
"""GPUs that FlashAttention 2 has kernels for."""
HEAD_STEP, LARGEST_HEAD = 8, 256
"""torch's kernel takes head sizes that are multiples of the first number, flash-attn's pads them; both end at the
second (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp of torch 2.11).
"""
HALF = ("bf16", "bfloat16", "fp16", "float16")
"""verl's names of the dtypes that FlashAttention computes in (verl/utils/torch_dtypes.py:19)."""


class Use(NamedTuple):
    """What a model that is trained asks of its attention; `longest` is in tokens, and `shape` None if unknown."""

    packed: bool
    dtype: str
    longest: int
    shape: ModelShape | None = None


class Lack(NamedTuple):
    """What an attention cannot do for a model: `cause` is `packing`, `dtype` or `model`, `text` follows its name."""

    cause: str
    text: str


def flash_lacks(use: Use) -> Iterator[Lack]:
    """Yield every reason why a model cannot have FlashAttention 2, whoever built its kernels."""
    if use.dtype not in HALF:
        yield Lack("dtype", f"computes in bf16 or fp16, not in {use.dtype}")
    if use.shape and use.shape.head_dim > LARGEST_HEAD:
        yield Lack("model", f"has head sizes up to {LARGEST_HEAD}, and the model's is {use.shape.head_dim}")


def varlen_lacks(use: Use) -> Iterator[Lack]:
    """Yield every reason why a model on a GPU cannot have `varlen`, sequence parallelism apart."""
    if not use.packed:
        yield Lack("packing", "takes packed sequences only")
    yield from flash_lacks(use)
    if use.shape is None:
        return
    if use.shape.head_dim % HEAD_STEP:
        yield Lack("model", f"has head sizes of multiples of {HEAD_STEP}, and the model's is {use.shape.head_dim}")
    if use.shape.window is not None and use.shape.window < use.longest:
        yield Lack("model", f"has no sliding window, and the model's has {use.shape.window} of {use.longest} tokens")
    if use.shape.softcap:
        yield Lack("model", "does not cap attention scores, as the model does")


def of_spec(spec: RunSpec) -> dict[str, str]:
    """The attention of policy and critic by their roles, as far as the values of a preset say it; `auto` if not."""
    roles = ("actor", "critic") if spec.algorithm.advantage == "gae" else ("actor",)
    keys = {role: ROLES[role].attention for role in roles}
    return {role: str(spec.verl.get(key, spec.verl.get(f"+{key}", spec.model.attention))) for role, key in keys.items()}


def shares_sequences(spec: RunSpec) -> bool:
    """Whether some model of a run has sequence parallelism, as far as the values of a preset say it."""
    given = verbatim_keys(spec)
    return any(_shares_sequences(given, role) for role in ROLES)


def decided(
    resolved: Resolved, *, installed: bool, policy: ModelShape | None = None, critic: ModelShape | None = None
) -> Resolved:
    """The preset with an attention in place of `auto`, whose origin is the reason.

    `installed` says that flash-attn is, where the run is trained. All models of a run have the same attention. A GPU
    that is too old is not looked for, so that a dry run shows what a start does; preflight refuses it.
    """
    spec = resolved.spec
    if spec.model.attention != AUTO:
        return resolved
    value, reason = _chosen(resolved, installed, {"actor": policy, "reference policy": policy, "critic": critic})
    model = spec.model.model_copy(update={"attention": value})
    origins = {**resolved.origins, FIELD: Origin("derived", reason=reason)}
    return dataclasses.replace(resolved, spec=spec.model_copy(update={"model": model}), origins=origins)


def _chosen(resolved: Resolved, installed: bool, shapes: Mapping[str, ModelShape | None]) -> tuple[str, str]:
    """The attention of a run's models and the reason for it."""
    spec = resolved.spec
    if spec.resources.platform == "cpu":
        return SDPA, "FlashAttention needs a GPU"
    here = Places(name="", data=Path(), checkpoints=Path())
    given = {override.key: override.value for override in overrides(resolved, here)}
    roles = ["actor", *(["critic"] if spec.algorithm.advantage == "gae" else [])]
    roles += ["reference policy"] if spec.algorithm.kl_loss or spec.algorithm.kl_in_reward else []
    if any(_shares_sequences(given, role) for role in roles):
        return FLASH, "verl exchanges the heads of sequence parallelism in flash-attn's function only"
    uses = [_use(given, role, spec, shapes[role]) for role in roles]
    for use in uses:
        if lack := next(flash_lacks(use), None):
            return SDPA, f"FlashAttention {lack.text}"
    if installed:
        return FLASH, "flash-attn is installed"
    for use in uses:
        if lack := next(varlen_lacks(use), None):
            return SDPA, f"flash-attn is not installed, and varlen {lack.text}"
    return VARLEN, "torch's own FlashAttention for packed sequences, since flash-attn is not known to be installed"


def _shares_sequences(given: Mapping[str, Any], role: str) -> bool:
    degrees = [given.get(key) for key in ROLES[role].sequence_parallel]
    return any(isinstance(degree, int) and degree > 1 for degree in degrees)


def _use(given: Mapping[str, Any], role: str, spec: RunSpec, shape: ModelShape | None) -> Use:
    """What a role asks for, with verl's own defaults for keys that are not given."""
    keys = ROLES[role]
    dtype = given.get(keys.compute_dtype) or "bf16"
    return Use(given.get(keys.padding) is not False, str(dtype), spec.data.max_length, shape)

"""Attention of packed sequences by torch's own variable-length FlashAttention, known to Transformers as `varlen`.

verl's FSDP engine concatenates the sequences of a micro-batch into one row without padding, and tells them apart by
`position_ids` alone (verl/workers/engine/fsdp/transformer_impl.py:1255 in 0.9.1). Of Transformers' implementations only
those of the flash-attn package, which is built for an hour, attend within each sequence of such a row; `sdpa` gets a
mask of every pair of the row's tokens (transformers/masking_utils.py:883). torch.nn.attention.varlen has the kernel of
FlashAttention 2, forward and backward, for a row and the cumulative lengths of its sequences.

The plugin of verl calls `apply`. Only processes that train import verl's engine, and only these are changed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from flashrl_cli.contract import PATCHED, VERL, before_import

VARLEN = "varlen"
"""Value of Transformers' `attn_implementation`."""
_ENGINE = "verl.workers.engine.fsdp.transformer_impl"


class Packing(NamedTuple):
    """The sequences in a row of tokens: where each begins, the number of tokens last, and the length of the longest.

    `ends` is an int32 tensor [sequences + 1] on the row's device, of the form that attention kernels call `cu_seqlens`.
    """

    ends: torch.Tensor
    longest: int


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packing, float | None], torch.Tensor]
"""Causal attention within each sequence: queries [tokens, heads, head size], keys and values [tokens, key-value heads,
head size], the packing and the scale of the scores (None: 1 / sqrt(head size)), to [tokens, heads, head size].
"""


def apply() -> None:
    """Prepare this process when it imports verl's FSDP engine, or at once if it has; others stay as they are."""
    before_import(_ENGINE, prepare)


def prepare() -> None:
    """Make `varlen` known to Transformers, and let a critic have the attention of its configuration.

    Raises RuntimeError for a verl other than 0.9.1.
    """
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl sets the attention of the trainer with verl {VERL} only")
    register()
    load_critic_with_its_attention()


def register(kernel: Kernel | None = None) -> None:
    """Register `varlen` with Transformers; `kernel` computes the attention (None: torch's, on CUDA)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(VARLEN, functools.partial(attend, kernel=kernel or flash))
    AttentionMaskInterface.register(VARLEN, without_mask)


def without_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> None:
    """The mask of packed sequences, which is none: `position_ids` tell them apart.

    Raises ValueError for a mask of padding.
    """
    if attention_mask is not None:
        raise ValueError(f"{VARLEN} attends to packed sequences, which need no attention_mask: remove the padding")


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    *,
    kernel: Kernel,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of packed sequences, as Transformers calls it.

    Takes queries [1, heads, tokens, head size], keys and values [1, key-value heads, tokens, head size], and
    position_ids [1, tokens]; returns [1, tokens, heads, head size]. Under autocast it computes in the dtype of that,
    otherwise in the values'. Raises ValueError for what the kernel does not compute: several rows, a mask, dropout,
    attention to later tokens, capped scores, sinks, or a window that is shorter than a sequence.
    """
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(f"{VARLEN} takes one row of packed sequences without a mask, not {query.shape[0]} padded rows")
    if position_ids is None or position_ids.shape != (1, query.shape[2]):
        shape = None if position_ids is None else list(position_ids.shape)
        raise ValueError(f"{VARLEN} needs position_ids [1, {query.shape[2]}] to tell sequences apart, not {shape}")
    if dropout:
        raise ValueError(f"{VARLEN} has no dropout, and the model asks for {dropout} (attention_dropout)")
    causal = more.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{VARLEN} is causal, and {type(module).__name__} also attends to later tokens")
    if lacking := [name for name in ("softcap", "s_aux") if more.get(name) is not None]:
        raise ValueError(f"{VARLEN} has no {' and no '.join(lacking)}, as {type(module).__name__} asks for")
    packing = packing_of(position_ids)
    window = more.get("sliding_window")
    if window is not None and window < packing.longest:
        raise ValueError(f"{VARLEN} has no sliding window: {window} tokens, and a sequence has {packing.longest}")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (part[0].transpose(0, 1).to(dtype).contiguous() for part in (query, key, value))
    return kernel(query, key, value, packing, scaling)[None], None


def packing_of(position_ids: torch.Tensor) -> Packing:
    """The sequences in position_ids [1, tokens]: one begins wherever the position does not continue the one before.

    All layers of a forward pass, and their recomputation, get the same tensor, so that the two waits for the device
    happen once and not in each layer.
    """
    # inference tensors have no version, and cannot be changed outside of inference mode
    version = None if position_ids.is_inference() else position_ids._version
    known: tuple[int | None, Packing] | None = _packings.get(position_ids)
    if known is None or known[0] != version:
        known = _packings[position_ids] = (version, _packing(position_ids))
    return known[1]


_packings = WeakTensorKeyDictionary()
"""Version and packing of each tensor of position_ids that is in use; an entry goes with its tensor."""


def _packing(position_ids: torch.Tensor) -> Packing:
    positions = position_ids[0]
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[1:] = positions[1:] != positions[:-1] + 1
    starts = torch.nonzero(begins)[:, 0]
    ends = torch.nn.functional.pad(starts, (0, 1), value=positions.numel()).int()
    return Packing(ends, int(ends.diff().max()))


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float | None
) -> torch.Tensor:
    """torch's variable-length FlashAttention 2, a Kernel for bf16 and fp16 on CUDA. Raises ValueError for other dtypes.

    Key-value heads are repeated for the query heads that share them where torch does not do that itself (before 2.12).
    """
    from torch.nn.attention.varlen import varlen_attn

    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{VARLEN} computes in bfloat16 or float16, not in {str(query.dtype).removeprefix('torch.')}")
    more: dict[str, Any] = {}
    if (shared := query.shape[1] // key.shape[1]) > 1:
        if _shares_heads():
            more["enable_gqa"] = True
        else:
            key, value = (part.repeat_interleave(shared, 1) for part in (key, value))
    ends, longest = packing
    found: torch.Tensor = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), **more
    )
    return found


@functools.cache
def _shares_heads() -> bool:
    """Whether torch's kernel takes fewer key-value heads than query heads."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def load_critic_with_its_attention() -> None:
    """Let a critic load with the attention that its configuration names, or else SDPA.

    verl/utils/model.py:649 always passes `attn_implementation="flash_attention_2"`, whatever the configuration says,
    and reports that flash-attn is missing as a missing `trl` (https://github.com/verl-project/verl/issues/5210). The
    trainer imports the function when it needs it, so replacing it in its module is enough. A model that Transformers
    cannot give a value for each token goes to verl's own function, which asks trl for a value head.
    """
    import verl.utils.model

    original = verl.utils.model.load_valuehead_model
    if getattr(original, PATCHED, False):
        return

    def load_valuehead_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        from transformers import AutoModelForTokenClassification

        if type(model_config) not in AutoModelForTokenClassification._model_mapping:
            return original(local_path, torch_dtype, model_config, trust_remote_code)
        return AutoModelForTokenClassification.from_pretrained(
            local_path,
            torch_dtype=torch_dtype,
            config=model_config,
            attn_implementation=getattr(model_config, "_attn_implementation", None) or "sdpa",
            trust_remote_code=trust_remote_code,
        )

    setattr(load_valuehead_model, PATCHED, True)
    verl.utils.model.load_valuehead_model = load_valuehead_model

"""Rows of jagged tensors by index, for verl's batches by tokens."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from flashrl_cli.contract import PATCHED, VERL


def rows_of(jagged: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Some rows of a dense jagged tensor [rows, ragged, ...] as a tensor of its own, by one indexing operation."""
    values, offsets = jagged.values(), jagged.offsets()
    indices = indices.to(offsets.device)
    lengths = offsets.diff()[indices]
    ends = torch.cat([offsets.new_zeros(1), lengths.cumsum(0)])
    shift = (offsets[indices] - ends[:-1]).repeat_interleave(lengths)
    positions = torch.arange(len(shift), device=offsets.device) + shift
    # known here: a GPU would have to be waited for to find the longest row when the batch is padded there
    extremes = {"min_seqlen": int(lengths.min()), "max_seqlen": int(lengths.max())}
    return torch.nested.nested_tensor_from_jagged(values[positions.to(values.device)], ends, **extremes)


def _dense(value: Any) -> bool:
    """Whether a field of a batch is a jagged tensor without holes whose second dimension is the ragged one."""
    if not isinstance(value, torch.Tensor) or not value.is_nested or value.layout != torch.jagged:
        return False
    return value.lengths() is None and value._ragged_idx == 1


def select_by_index() -> None:
    """Have verl take a micro-batch's rows from a batch without unbinding the batch (idempotent).

    verl splits every jagged field of the whole batch into its rows for each micro-batch
    (verl/utils/tensordict_utils.py:495 in 0.9.1, https://github.com/verl-project/verl/pull/7097): 0.4 s of a process
    for 1,024 sequences in 8 micro-batches, and the more sequences, the more micro-batches. Fields that are not such
    tensors are selected as before. Raises RuntimeError for a verl other than 0.9.1.
    """
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl selects rows of batches by index with verl {VERL} only")
    import verl.utils.tensordict_utils as verls

    original = verls.index_select_tensor_dict
    if getattr(original, PATCHED, False):
        return

    def index_select_tensor_dict(batch: Any, indices: torch.Tensor | list[int]) -> Any:
        if batch is None:
            return original(batch, indices)
        rows = torch.as_tensor(indices)
        jagged = {key: value for key, value in batch.items() if _dense(value)}
        selected = original(batch.exclude(*jagged), rows)
        for key, value in jagged.items():
            selected[key] = rows_of(value, rows)
        return selected

    setattr(index_select_tensor_dict, PATCHED, True)
    verls.index_select_tensor_dict = index_select_tensor_dict

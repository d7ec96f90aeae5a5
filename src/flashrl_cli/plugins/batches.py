"""Batches of jagged tensors in operations that do not grow with the rows, where verl goes row by row.

Each function replaces one of verl 0.9.1 with the same result. On a GPU the loops cost more than their Python: an index
or a length that is a tensor there makes the process wait for the GPU.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from flashrl_cli import contract
from flashrl_cli.contract import PATCHED, VERL

IMAGES = "multi_modal_inputs"
"""The only field of objects that an engine of verl's reads (verl/workers/engine/fsdp/transformer_impl.py:1177)."""
UNREAD = frozenset({"dummy_tensor", "entropy", "log_probs", "rm_scores", "rollout_log_probs", "token_level_rewards"})
"""Tensors of a batch that neither verl's engines nor its losses read (verl/workers/utils/losses.py)."""


def apply() -> None:
    """Make every replacement in this process (idempotent). Raises RuntimeError for a verl other than 0.9.1."""
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl handles batches of verl {VERL} only")
    select_by_index()
    balance_integers()
    leave_objects_out()
    import verl.workers.utils.padding as verls

    if not getattr(verls.response_from_nested, PATCHED, False):
        original = verls.no_padding_2_padding

        def no_padding_2_padding(tensor: torch.Tensor, data: Any) -> torch.Tensor:
            return padded_responses(tensor, data) if data["prompts"].is_nested else original(tensor, data)

        contract.replace_in_verl(verls, no_padding_2_padding)
        for function in (response_from_nested, response_to_nested):
            contract.replace_in_verl(verls, function)


def spans(values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A jagged tensor [rows, ragged, ...] of the rows values[start : start + length]."""
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    shift = (starts - ends[:-1]).repeat_interleave(lengths)
    positions = torch.arange(len(shift), device=shift.device) + shift
    # known here: a GPU would have to be waited for to find the longest row when the batch is padded there
    extremes = {"min_seqlen": int(lengths.min()), "max_seqlen": int(lengths.max())}
    return torch.nested.nested_tensor_from_jagged(values[positions.to(values.device)], ends, **extremes)


def rows_of(jagged: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Some rows of a dense jagged tensor [rows, ragged, ...] as a tensor of its own, by one indexing operation."""
    offsets = jagged.offsets()
    indices = indices.to(offsets.device)
    return spans(jagged.values(), offsets[indices], offsets.diff()[indices])


def _dense(value: Any) -> bool:
    """Whether a field of a batch is a jagged tensor without holes whose second dimension is the ragged one."""
    if not isinstance(value, torch.Tensor) or not value.is_nested or value.layout != torch.jagged:
        return False
    return value.lengths() is None and value._ragged_idx == 1


def select_by_index() -> None:
    """Have verl take a micro-batch's rows from a batch without unbinding the batch.

    verl splits every jagged field of the whole batch into its rows for each micro-batch
    (verl/utils/tensordict_utils.py:495 in 0.9.1, https://github.com/verl-project/verl/pull/7097): 0.4 s of a process
    for 1,024 sequences in 8 micro-batches, and the more sequences, the more micro-batches. Fields that are not such
    tensors are selected as before.
    """
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


def balance_integers() -> None:
    """Have verl's Karmarkar-Karp method compare Python's integers.

    verl's trainer gives it a tensor (verl/trainer/ppo/v1/trainer_base.py:1625), whose elements are compared a hundred
    thousand times for 1,024 sequences: 0.3 s of a step before the log-probs, even for a single rank.
    """
    import verl.utils.seqlen_balancing as verls

    original = verls.get_seqlen_balanced_partitions
    if getattr(original, PATCHED, False):
        return

    def get_seqlen_balanced_partitions(seqlen_list: Any, k_partitions: int, equal_size: bool) -> list[list[int]]:
        numbers = seqlen_list.tolist() if isinstance(seqlen_list, torch.Tensor) else seqlen_list
        found: list[list[int]] = original(numbers, k_partitions, equal_size)
        return found

    contract.replace_in_verl(verls, get_seqlen_balanced_partitions)


def leave_objects_out() -> None:
    """Let the trainer's workers fetch of a batch what they read.

    verl gives a worker every field of TransferQueue, the columns of the data set and the agent loop's extras included
    (verl/utils/transferqueue_utils.py:174). Each row's value of these becomes an object of TensorDict's, which is
    copied to the device with its micro-batch: 0.3 s of a process for one such field of 1,024 rows in 12 micro-batches
    (benchmarks/results/batches.json), and there are more than ten of them, in the log-probs and in the update. In a
    batch without images the field for them is left out, too.
    """
    import verl.utils.transferqueue_utils as verls

    original = verls._async_meta_to_realdata
    if getattr(original, PATCHED, False):
        return

    async def _async_meta_to_realdata(meta: Any) -> Any:
        if isinstance(meta, verls.KVBatchMeta):
            meta = await verls.async_kv_batch_meta2batch_meta(meta)
        data = await original(only_read(meta))
        if IMAGES in data and not any(data.get(IMAGES).tolist()):
            data.pop(IMAGES)
        return data

    setattr(_async_meta_to_realdata, PATCHED, True)
    verls._async_meta_to_realdata = _async_meta_to_realdata


def only_read(meta: Any) -> Any:
    """A BatchMeta of TransferQueue's with the fields alone that the trainer's workers read."""
    fields = {
        name: schema
        for name, schema in meta.field_schema.items()
        if name == IMAGES or not (schema.get("is_non_tensor") or name in UNREAD)
    }
    return type(meta)(
        global_indexes=meta.global_indexes,
        partition_ids=meta.partition_ids,
        field_schema=fields,
        production_status=meta.production_status,
        extra_info=meta.extra_info,
        custom_meta=meta.custom_meta,
        _custom_backend_meta=meta._custom_backend_meta,
    )


def padded_responses(tensor: torch.Tensor, data: Any) -> torch.Tensor:
    """The responses' part [rows, longest, ...] of a model's outputs [tokens, ...], as verl's `no_padding_2_padding`.

    verl cuts and pads each row (verl/workers/utils/padding.py:130), and the gradient of each cut is a tensor of all
    tokens. `data` has the jagged prompts and responses. Raises ValueError for an empty prompt, before whose response
    no output stands, and for another number of outputs.
    """
    from verl.utils import tensordict_utils as tu

    values = tensor.values() if tensor.is_nested else tensor
    prompts, responses = (data[name].offsets().diff() for name in ("prompts", "responses"))
    longest = tu.get_non_tensor_data(data=data, key="max_response_len", default=-1)
    if longest < 0:
        longest = responses.max().item()
    ends = (prompts + responses).cumsum(0)
    if ends[-1].item() != len(values) or prompts.eq(0).any():
        raise ValueError(f"{len(values)} outputs are not those of prompts of {prompts} and responses of {responses}")
    columns = torch.arange(longest, device=ends.device)
    # the output for a token stands at the token before it
    positions = (ends - responses - 1)[:, None] + columns
    real = columns < responses[:, None]
    found = values[positions.clamp_(max=len(values) - 1)]
    return torch.where(real.view(*real.shape, *(1,) * (values.ndim - 1)), found, found.new_zeros(()))


def response_from_nested(tensor: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """The responses' part [rows, ragged] of a model's outputs [rows, ragged] (verl/workers/utils/padding.py:194)."""
    lengths = response_mask.offsets().diff()
    return spans(tensor.values(), tensor.offsets()[1:] - lengths - 1, lengths)


def response_to_nested(tensor: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Padded responses [rows, longest, ...] without their padding (verl/workers/utils/padding.py:213)."""
    rows, longest = tensor.shape[:2]
    lengths = response_mask.offsets().diff().clamp(max=longest)
    starts = torch.arange(rows, device=lengths.device) * longest
    return spans(tensor.flatten(0, 1), starts, lengths)

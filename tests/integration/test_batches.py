"""Micro-batches whose rows are taken by index: the same as verl's, in calls that do not grow with the batch."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing verl warns of much that is not ours."""


@pytest.fixture
def verls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's module of such functions; afterwards it is as it was."""
    import verl.utils.tensordict_utils as module

    monkeypatch.setattr(module, "index_select_tensor_dict", module.index_select_tensor_dict)
    return module


def batch_of(count: int, verls: Any) -> Any:
    """Every kind of field that a batch of verl's has."""
    import torch
    from tensordict import TensorDict

    make = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (count,), generator=make).tolist()
    lengths[2] = 0

    def nested(*more: int) -> Any:
        rows = [torch.randn(length, *more, generator=make) for length in lengths]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    positions = [torch.randint(9, (4, length), generator=make) for length in lengths]
    data = TensorDict(
        {
            "input_ids": nested(),
            "routed": nested(2, 3),
            "mrope": verls.nested_tensor_from_tensor_list(positions, ragged_idx=2),
            "dense": torch.randn(count, 3, generator=make),
        },
        batch_size=[count],
    )
    verls.assign_non_tensor(data, temperature=0.7)
    verls.assign_non_tensor_stack(data, "uid", [f"row {index}" for index in range(count)])
    return data


@pytest.mark.parametrize("chosen", [[3, 0, 4], [2], [0, 1, 2, 3, 4], [4, 2, 4]])
@pytest.mark.parametrize("listed", [True, False])
def test_rows_are_those_of_verl(chosen: list[int], listed: bool, verls: Any) -> None:
    import torch

    from flashrl_cli.plugins import batches

    data = batch_of(5, verls)
    indices = chosen if listed else torch.tensor(chosen)
    right = verls.index_select_tensor_dict(data, indices)
    batches.select_by_index()
    batches.select_by_index()
    found = verls.index_select_tensor_dict(data, indices)
    assert found.batch_size == right.batch_size
    assert set(found.keys()) == set(right.keys())
    for name in ("input_ids", "routed", "mrope"):
        one, other = found[name], right[name]
        assert (one.dtype, one._ragged_idx, one.shape[0]) == (other.dtype, other._ragged_idx, len(chosen))
        assert torch.equal(one.values(), other.values())
        assert torch.equal(one.offsets(), other.offsets())
    assert torch.equal(found["dense"], right["dense"])
    assert found["temperature"] == 0.7
    assert list(found["uid"]) == [f"row {index}" for index in chosen]
    assert verls.index_select_tensor_dict(None, indices) is None


def test_a_batch_is_not_taken_apart(verls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own unbinds each jagged field of the whole batch for each micro-batch."""
    import torch
    from verl.utils.seqlen_balancing import rearrange_micro_batches, restore_dynamic_batch

    from flashrl_cli.plugins import batches

    batches.select_by_index()
    data = batch_of(6, verls).exclude("mrope", "routed")
    data["input_ids"] = torch.nested.as_nested_tensor([torch.arange(n + 1) for n in range(6)], layout=torch.jagged)
    original = torch.Tensor.unbind

    def unbind(tensor: torch.Tensor, *args: int) -> Any:
        assert not tensor.is_nested, "a batch was taken apart"
        return original(tensor, *args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "unbind", unbind)
        micro_batches, order = rearrange_micro_batches(data, max_token_len=8)
    assert len(micro_batches) > 1
    rows = [row for one in micro_batches for row in one["input_ids"].unbind()]
    restored = restore_dynamic_batch(torch.nested.as_nested_tensor(rows, layout=torch.jagged), order)
    assert torch.equal(restored.values(), data["input_ids"].values())


def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashrl_cli.plugins import batches

    monkeypatch.setattr(batches, "VERL", "0.9.2")
    with pytest.raises(RuntimeError, match=r"verl 0\.9\.2 only"):
        batches.select_by_index()

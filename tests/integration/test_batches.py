"""Batches that are handled without loops over their rows: the same as by verl's own functions."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
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


@pytest.fixture
def padding(verls: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's functions for padding, and those of its modules that `batches.apply` changes; as they were afterwards."""
    import verl.utils.seqlen_balancing as balancing
    import verl.utils.transferqueue_utils as queue
    import verl.workers.utils.padding as module

    names = ("no_padding_2_padding", "response_from_nested", "response_to_nested")
    original = SimpleNamespace(**{name: vars(module)[name] for name in names})
    for name in names:
        monkeypatch.setattr(module, name, vars(module)[name])
    monkeypatch.setattr(balancing, "get_seqlen_balanced_partitions", balancing.get_seqlen_balanced_partitions)
    monkeypatch.setattr(queue, "_async_meta_to_realdata", queue._async_meta_to_realdata)
    return original


def jagged(rows: list[Any]) -> Any:
    import torch

    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("more", [(), (3,)])
@pytest.mark.parametrize("longest", [None, 4, 12])
@pytest.mark.parametrize("nested", [True, False])
def test_padded_responses_are_those_of_verl(
    more: tuple[int, ...], longest: int | None, nested: bool, padding: Any, verls: Any
) -> None:
    """A longest response that is set may be shorter than one of the batch, which is then cut off."""
    import torch
    import verl.workers.utils.padding as changed
    from tensordict import TensorDict

    from flashrl_cli.plugins import batches

    batches.apply()
    batches.apply()
    assert changed.no_padding_2_padding is not padding.no_padding_2_padding
    prompts, responses = [1, 5, 2, 7], [3, 0, 9, 1]
    data = TensorDict(
        {
            "prompts": jagged([torch.ones(length) for length in prompts]),
            "responses": jagged([torch.ones(length) for length in responses]),
        },
        batch_size=[4],
    )
    if longest is not None:
        verls.assign_non_tensor(data, max_response_len=longest)
    values = torch.randn(sum(prompts) + sum(responses), *more)
    both = []
    for function in (padding.no_padding_2_padding, changed.no_padding_2_padding):
        leaf = values.clone().requires_grad_()
        lengths = torch.tensor([0, *(a + b for a, b in zip(prompts, responses, strict=True))])
        tensor = torch.nested.nested_tensor_from_jagged(leaf, lengths.cumsum(0)) if nested else leaf
        found = function(tensor, data)
        weights = torch.arange(found.numel(), dtype=torch.float32).view(found.shape)
        (found * weights).sum().backward()
        both.append((found, leaf.grad))
    (right, gradient), (found, other) = both
    assert found.dtype == right.dtype
    assert torch.equal(found, right)
    assert torch.equal(other, gradient)


def test_parts_of_responses_are_those_of_verl(padding: Any) -> None:
    import torch
    import verl.workers.utils.padding as changed

    from flashrl_cli.plugins import batches

    batches.apply()
    prompts, responses = [1, 5, 2, 7], [3, 0, 9, 1]
    outputs = jagged([torch.randn(a + b) for a, b in zip(prompts, responses, strict=True)])
    mask = jagged([torch.ones(length, dtype=torch.int64) for length in responses])
    for name, tensor in (
        ("response_from_nested", outputs),
        ("response_to_nested", torch.randn(4, 9)),
        ("response_to_nested", torch.randn(4, 5, 2)),
    ):
        right, found = vars(padding)[name](tensor, mask), vars(changed)[name](tensor, mask)
        assert found.dtype == right.dtype
        assert torch.equal(found.values(), right.values())
        assert torch.equal(found.offsets(), right.offsets())
        assert found._get_max_seqlen() == right._get_max_seqlen()


@pytest.mark.parametrize(("ranks", "equal"), [(1, True), (8, True), (5, False)])
def test_balanced_parts_are_those_of_verl(ranks: int, equal: bool, padding: Any) -> None:
    import torch
    import verl.utils.seqlen_balancing as changed

    from flashrl_cli.plugins import batches

    draw = random.Random(0)
    workloads = changed.calculate_workload(torch.tensor([draw.randint(1, 40) for _ in range(64)]))
    right = changed.get_seqlen_balanced_partitions(workloads, ranks, equal)
    batches.apply()
    original, given = changed.karmarkar_karp, []

    def noting(seqlen_list: Any, **settings: Any) -> Any:
        given.append(seqlen_list)
        return original(seqlen_list, **settings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(changed, "karmarkar_karp", noting)
        assert changed.get_seqlen_balanced_partitions(workloads, ranks, equal) == right
    assert {type(number) for number in given[0]} == {int}


class Client:
    """TransferQueue's client with one batch."""

    def __init__(self, fields: dict[str, Any]) -> None:
        from tensordict import TensorDict
        from transfer_queue.metadata import BatchMeta, extract_field_schema

        self.data = TensorDict(fields, batch_size=[3])
        self.fetched: list[str] = []
        schema = extract_field_schema(self.data)
        self.meta = BatchMeta([4, 5, 6], ["train"] * 3, schema, extra_info={"temperature": 0.5})

    async def async_get_data(self, meta: Any) -> Any:
        assert meta.global_indexes == self.meta.global_indexes
        self.fetched = meta.field_names
        return self.data.select(*meta.field_names)


@pytest.mark.parametrize("images", [True, False])
def test_workers_fetch_what_they_read(images: bool, padding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import verl.utils.transferqueue_utils as queue
    from tensordict import NonTensorStack

    from flashrl_cli.plugins import batches

    ids = jagged([torch.arange(length) for length in (2, 1, 3)])
    inputs = [{}, {"pixel_values": torch.ones(2)} if images else {}, {}]
    client = Client(
        {
            "input_ids": ids,
            "advantages": torch.ones(3, 4),
            "rm_scores": torch.ones(3, 4),
            "raw_prompt": NonTensorStack("a", "b", "c"),
            "extra_fields": NonTensorStack({"a": 1}, {}, {}),
            "multi_modal_inputs": NonTensorStack(*inputs),
        }
    )
    monkeypatch.setattr(queue, "tq", SimpleNamespace(get_client=lambda: client))
    batches.apply()
    data = asyncio.run(queue._async_meta_to_realdata(client.meta))
    assert client.fetched == ["advantages", "input_ids", "multi_modal_inputs"]
    expected = {"advantages", "input_ids", "temperature", *(["multi_modal_inputs"] if images else [])}
    assert set(data.keys()) == expected
    assert data["temperature"] == 0.5
    assert torch.equal(data["input_ids"].values(), ids.values())
    if images:
        assert torch.equal(data["multi_modal_inputs"][1]["pixel_values"], torch.ones(2))
    assert "raw_prompt" in client.meta.field_names, "the batch's own description has all fields"


def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashrl_cli.plugins import batches

    monkeypatch.setattr(batches, "VERL", "0.9.2")
    with pytest.raises(RuntimeError, match=r"verl 0\.9\.2 only"):
        batches.apply()

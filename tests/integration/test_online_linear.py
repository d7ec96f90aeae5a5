"""8-bit weights written in place by vLLM's own loaders, against layers that are loaded whole, rotated and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing vLLM warns of much that is not ours."""

if TYPE_CHECKING:
    import torch

Held = dict[str, tuple["torch.Tensor", "torch.Tensor"]]

HIDDEN, INTER, HEADS, KV_HEADS = 64, 96, 4, 2
BLOCK = 32
"""The largest block of a rotation that divides both widths."""
HEAD = HIDDEN // HEADS
SHARDS: dict[str, dict[Any, int]] = {
    "qkv_proj": {"q": HIDDEN, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD},
    "gate_up_proj": {0: INTER, 1: INTER},
    "down_proj": {None: HIDDEN},
}
"""Rows of each shard of a layer, under the id that vLLM's loader takes."""


class Plain:
    """A kernel that keeps rows as they are quantized, transposed, as CUTLASS does."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        import torch

        layer.weight = torch.nn.Parameter(layer.weight.data.t(), requires_grad=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """vLLM's configuration and groups for one process without an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as groups

    vllm_config = VllmConfig()
    with set_current_vllm_config(vllm_config):
        where = f"file://{tmp_path_factory.mktemp('group')}/store"
        groups.init_distributed_environment(1, 0, where, 0, backend="gloo")
        groups.initialize_model_parallel()
        yield vllm_config
        groups.destroy_model_parallel()
        groups.destroy_distributed_environment()


@pytest.fixture(params=[0, "auto"], ids=["plain", "rotated"])
def model(request: pytest.FixtureRequest, config: Any, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Three kinds of parallel layers, loaded once with weights of seed 0."""
    import torch
    from vllm.model_executor.layers import linear

    from flashrl_cli import contract
    from flashrl_cli.plugins.linear import Int8OnlineConfig, Int8OnlineLinearMethod

    monkeypatch.setenv(contract.ENV_ROLLOUT, contract.RolloutOptions(rotation=request.param).text())
    monkeypatch.setattr(Int8OnlineLinearMethod, "choose_kernel", lambda self, layer: Plain())
    monkeypatch.setattr(Int8OnlineLinearMethod, "row_kernels", frozenset({"Plain"}))
    options: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": Int8OnlineConfig()}
    found = torch.nn.Module()
    found.rotates = request.param == "auto"
    found.qkv_proj = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix="qkv_proj", **options)
    found.gate_up_proj = linear.MergedColumnParallelLinear(HIDDEN, [INTER] * 2, prefix="gate_up_proj", **options)
    found.down_proj = linear.RowParallelLinear(INTER, HIDDEN, prefix="down_proj", **options)
    load(found, weights(0))
    return found


def weights(seed: int) -> dict[tuple[str, Any], torch.Tensor]:
    """Shards whose rows differ much in size."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        (name, shard): torch.rand(rows, 1, generator=generator)
        * torch.randn(rows, INTER if name == "down_proj" else HIDDEN, generator=generator)
        for name, shards in SHARDS.items()
        for shard, rows in shards.items()
    }


def load(model: torch.nn.Module, shards: dict[tuple[str, Any], torch.Tensor]) -> None:
    """As a model's load_weights does."""
    for (name, shard), weight in shards.items():
        parameter = model.get_submodule(name).weight
        parameter.weight_loader(parameter, weight, *([] if shard is None else [shard]))


def held(model: torch.nn.Module) -> Held:
    layers = {name: model.get_submodule(name) for name in SHARDS}
    return {name: (layer.weight.data.t().clone(), layer.weight_scale.data.clone()) for name, layer in layers.items()}


def expected(model: torch.nn.Module, shards: dict[tuple[str, Any], torch.Tensor]) -> Held:
    """Each layer's shards joined in bf16, rotated as the model does, and quantized as one."""
    import torch

    found = {}
    for name in SHARDS:
        whole = torch.cat([weight for (layer, _), weight in shards.items() if layer == name]).to(torch.bfloat16)
        whole = turned(whole) if model.rotates else whole
        scales = (whole.abs().amax(1, keepdim=True).float() / 127).clamp_min(1e-8)
        found[name] = ((whole.float() / scales).round().clamp(-127, 127).to(torch.int8), scales)
    return found


def turned(whole: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """Each block of a row times the Hadamard matrix divided by its size, by the entries' definition."""
    import torch

    numbers = range(block)
    matrix = torch.tensor([[(-1.0) ** (row & column).bit_count() for column in numbers] for row in numbers]) / block
    return (whole.float().reshape(-1, block) @ matrix).reshape(whole.shape)


def same(left: Held, right: Held) -> bool:
    import torch

    return all(torch.equal(a, b) for name in SHARDS for a, b in zip(left[name], right[name], strict=True))


def test_shards_in_any_order_give_what_whole_layers_do(model: torch.nn.Module) -> None:
    from flashrl_cli.plugins import refit

    assert same(held(model), expected(model, weights(0)))
    assert refit.writes_in_place(model)
    places = [model.get_submodule(name).weight.data_ptr() for name in SHARDS]
    for seed in (1, 2):
        new = weights(seed)
        with refit.in_place(model, lambda: None) as written:
            load(model, dict(reversed(new.items())))
        assert all(rows.written == rows.shape[0] for rows in written.values())
        assert same(held(model), expected(model, new))
    assert places == [model.get_submodule(name).weight.data_ptr() for name in SHARDS]
    assert not any(hasattr(model.get_submodule(name).weight, "weight_loader") for name in SHARDS)


def test_rows_that_come_twice_do_not_stand_for_others(model: torch.nn.Module) -> None:
    from flashrl_cli.plugins import refit

    new = weights(1)
    del new["qkv_proj", "k"]
    with refit.in_place(model, lambda: None) as written:
        load(model, new)
        load(model, new)
    torn = {name: rows.shape[0] - rows.written for name, rows in written.items()}
    assert torn == {"qkv_proj": KV_HEADS * HEAD, "gate_up_proj": 0, "down_proj": 0}


def near(base: dict[tuple[str, Any], torch.Tensor], seed: int) -> dict[tuple[str, Any], torch.Tensor]:
    """Weights that differ from others by 1 %."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {key: one * (1 + 0.01 * torch.randn(one.shape, generator=generator)) for key, one in base.items()}


def refitted(
    model: torch.nn.Module, updates: list[dict[tuple[str, Any], torch.Tensor]], *, backwards: bool = False
) -> list[dict[str, float] | None]:
    """The figures of refits in place."""
    from flashrl_cli.plugins import refit
    from flashrl_cli.plugins.arrival import Arrival

    found, arrival = [], Arrival(model)
    for new in updates:
        with arrival.watching(), refit.in_place(model, lambda: None):
            load(model, dict(reversed(new.items())) if backwards else new)
        found.append(arrival.figures())
    return found


def truth(model: torch.nn.Module, updates: list[dict[tuple[str, Any], torch.Tensor]]) -> dict[str, float]:
    """The figures of the last refit over all weights."""
    import torch

    sent, codes, values = [], [], []
    for new in (updates[0], *updates[-2:]):
        rows = list(expected(model, new).values())
        sent.append(torch.cat([one.to(torch.bfloat16).double().flatten() for one in new.values()]))
        codes.append(torch.cat([weight.double().flatten() for weight, _ in rows]))
        held = [weight.double() * scales for weight, scales in rows]
        # turned twice, a row is divided by the block
        held = [(turned(one) * BLOCK).double() if model.rotates else one for one in held]
        values.append(torch.cat([one.flatten() for one in held]))
    wanted, got = sent[2] - sent[0], values[2] - values[0]
    return {
        "codes_changed": float((codes[2] != codes[1]).double().mean()),
        "weights_changed": float((sent[2] != sent[1]).double().mean()),
        "arrived": float(got @ wanted / (wanted @ wanted)),
        "update_cosine": float(got @ wanted / got.norm() / wanted.norm()),
    }


def test_the_figures_of_a_refit_are_those_of_its_weights(model: torch.nn.Module) -> None:
    updates = [weights(1), near(weights(1), 2)]
    updates += [near(updates[1], 3), updates[1]]
    found = refitted(model, updates)
    assert found[0] is None
    for number, figures in enumerate(found[1:], start=2):
        assert figures
        wanted = truth(model, updates[:number])
        assert {name: figures[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
        assert (figures["sampled"], figures["codes_error"], figures["arrived_error"]) == (
            sum(weight.numel() for weight in updates[0].values()), 0, 0,
        )  # fmt: skip
    same_again = refitted(model, [updates[0], updates[0]])[1]
    assert same_again
    assert (same_again["codes_changed"], same_again["weights_changed"]) == (0, 0)
    assert "arrived" not in same_again, "nothing was to arrive"


def test_a_sample_of_rows_shows_what_all_of_them_do(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within five standard errors, and whatever the order in which shards arrive."""
    from flashrl_cli.plugins import arrival

    updates = [weights(1), near(weights(1), 2)]
    every = truth(model, updates)
    (_, whole), size = refitted(model, updates), sum(weight.numel() for weight in updates[0].values())
    monkeypatch.setattr(arrival, "SAMPLE", size // 5)
    found, backwards = (refitted(model, updates, backwards=one)[1] for one in (False, True))
    assert found
    assert whole
    assert found == backwards
    assert size / 8 < found["sampled"] < size / 3
    for name, error in (("codes_changed", "codes_error"), ("arrived", "arrived_error")):
        assert 0 < abs(found[name] - every[name]) < 5 * found[error]
    assert found["codes_error"] < 0.1


def test_figures_of_several_workers_are_logged_as_one() -> None:
    from flashrl_cli.plugins.arrival import pooled

    first, second = {"sampled": 8, "codes_changed": 0.25, "arrived": 1.0}, {"sampled": 8, "codes_changed": 0.75}
    assert pooled([first, None, second]) == {"refit/codes_changed": 0.5, "refit/arrived": 1.0}
    assert pooled([None, None]) == {}


def test_columns_of_a_wider_weight_are_quantized_alone(model: torch.nn.Module) -> None:
    """A tensor-parallel rank gets some columns of a row-parallel layer: its scales are those of what it holds."""
    import torch

    layer = model.get_submodule("down_proj")
    rows = layer.quant_method.rows(layer)
    wide = torch.randn(HIDDEN, 2 * INTER, generator=torch.Generator().manual_seed(3))
    rows.copy_(wide.narrow(1, INTER, INTER))
    assert same(held(model), expected(model, {**weights(0), ("down_proj", None): wide[:, INTER:]}))
    with pytest.raises(RuntimeError, match="columns of a weight"):
        rows.narrow(1, 0, 8)


def test_what_cannot_be_written_in_place_is_left_to_the_layerwise_reload(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from flashrl_cli.plugins import refit

    layer = model.get_submodule("down_proj")
    with monkeypatch.context() as patch:
        patch.setattr(type(layer.quant_method), "row_kernels", frozenset())
        assert not refit.writes_in_place(model)
    assert refit.writes_in_place(model)
    plain = layer.weight.data
    layer.weight.data = torch.nn.functional.pad(plain.t(), (0, 16)).t()
    assert not refit.writes_in_place(model)
    layer.weight.data = plain
    model.experts = torch.nn.Module()
    vars(model.experts)["process_weights_after_loading"] = lambda: None
    assert not refit.writes_in_place(model)


@pytest.mark.parametrize(("rank", "kept"), [("0", "bf16"), ("1", "bf16"), ("2", "int8"), (None, None)])
def test_the_first_replicas_of_a_mixed_run_stay_in_bf16(
    config: Any, monkeypatch: pytest.MonkeyPatch, rank: str | None, kept: str | None
) -> None:
    import torch
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from flashrl_cli import contract
    from flashrl_cli.plugins.linear import RANK, Int8OnlineConfig
    from flashrl_cli.plugins.refit import describe

    monkeypatch.setenv(contract.ENV_ROLLOUT, contract.RolloutOptions(bf16_replicas=2).text())
    monkeypatch.delenv(RANK, raising=False)
    if rank is None:
        with pytest.raises(RuntimeError, match="VERL_REPLICA_RANK does not say which"):
            ReplicatedLinear(HIDDEN, HIDDEN, quant_config=Int8OnlineConfig())
        return
    monkeypatch.setenv(RANK, rank)
    layer = ReplicatedLinear(
        HIDDEN, HIDDEN, bias=False, params_dtype=torch.bfloat16, quant_config=Int8OnlineConfig(), prefix="a"
    )
    layer.weight.weight_loader(layer.weight, torch.randn(HIDDEN, HIDDEN))
    found = describe(torch.nn.Sequential(layer), device=torch.device("cpu"), refits=1, refit_s=0.0)
    assert (found.precision, found.quantized_layers) == (kept, int(kept == "int8"))


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from flashrl_cli.plugins.linear import Int8OnlineLinearMethod

    monkeypatch.setattr(vllm, "__version__", "0.30.1")
    with pytest.raises(RuntimeError, match=r"made for vLLM 0\.24 to 0\.28, and this is 0\.30\.1"):
        Int8OnlineLinearMethod()

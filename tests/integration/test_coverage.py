"""Weight updates of vLLM's own layers, in place and layer by layer: what is left out is noticed, whatever kind of
tensor it is.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.test_online_linear import Plain, config

__all__ = ["config"]
pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing vLLM warns of much that is not ours."""

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

HIDDEN, INTER, HEADS, KV_HEADS, VOCABULARY, EXPERTS = 64, 96, 4, 2, 70, 3
HEAD = HIDDEN // HEADS
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS: dict[str, Any] = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
LAYERWISE, IN_PLACE = "layerwise", "in place"
HOW = pytest.mark.parametrize("how", [LAYERWISE, IN_PLACE])
BITS = pytest.mark.parametrize("quantized", [False, True], ids=["bf16", "int8"])


def load_weights(model: Any, weights: Any) -> None:
    """As vLLM's models do, which drop biases that they have not."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights:
        part, _, kind = name.partition(".")
        where = next((f"{whole}.{kind}" for whole, parts in PACKED.items() if part in parts), name)
        if (part == "lm_head" and model.tied) or (where not in parameters and kind == "bias"):
            continue
        shard = [SHARDS[part]] if part in SHARDS else []
        if part == "experts":
            where, shard = f"experts.{kind[2:]}", [int(kind[0])]
        parameter = parameters[where]
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight, *shard)


def load_expert(param: torch.Tensor, weight: torch.Tensor, expert: int) -> None:
    """As vLLM's fused experts do: one parameter for all, some columns of it filled by nobody."""
    room = param.data[expert]
    parts = {0: weight} if len(weight) == HIDDEN else {0: weight[:INTER], INTER: weight[INTER:]}
    for start, part in parts.items():
        room.narrow(0, start, len(part)).narrow(1, 0, part.shape[1]).copy_(part)


def engine_model(*, quantized: bool, tied: bool = False) -> Any:
    """A layer of each kind, with a vocabulary that is padded and biases in the fused projection."""
    import torch
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    from flashrl_cli.plugins.linear import Int8OnlineConfig

    options: dict[str, Any] = {
        "params_dtype": torch.bfloat16,
        "quant_config": Int8OnlineConfig() if quantized else None,
    }

    class Model(torch.nn.Module):  # type: ignore[misc]
        packed_modules_mapping = PACKED
        load_weights = load_weights

    model: Any = Model()
    model.tied = tied
    model.embed_tokens = vocabulary.VocabParallelEmbedding(VOCABULARY, HIDDEN, params_dtype=torch.bfloat16)
    model.qkv_proj = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix="qkv_proj", **options)
    model.gate_up_proj = linear.MergedColumnParallelLinear(
        HIDDEN, [INTER] * 2, bias=False, prefix="gate_up_proj", **options
    )
    model.down_proj = linear.RowParallelLinear(INTER, HIDDEN, bias=False, prefix="down_proj", **options)
    model.norm = torch.nn.Module()
    model.norm.register_parameter("weight", torch.nn.Parameter(torch.ones(HIDDEN), requires_grad=False))
    model.norm.register_buffer("cos_sin_cache", torch.ones(4))
    model.experts = torch.nn.Module()
    for name, rows in (("w13_weight", 2 * INTER), ("w2_weight", HIDDEN)):
        weight = torch.nn.Parameter(torch.zeros(EXPERTS, rows, 128), requires_grad=False)
        weight.weight_loader = load_expert
        model.experts.register_parameter(name, weight)
    model.lm_head = vocabulary.ParallelLMHead(VOCABULARY, HIDDEN, params_dtype=torch.bfloat16)
    if tied:
        model.lm_head = model.lm_head.tie_weights(model.embed_tokens)
    record_metadata_for_reloading(model)
    model.load_weights(trained(0).items())
    return model


def trained(seed: int) -> Tensors:
    """All tensors as a trainer sends them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = {
        "q_proj": HIDDEN,
        "k_proj": KV_HEADS * HEAD,
        "v_proj": KV_HEADS * HEAD,
        "gate_proj": INTER,
        "up_proj": INTER,
    }
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (count, HIDDEN) for name, count in rows.items()}
    shapes |= {f"{name}.bias": (rows[name],) for name in PACKED["qkv_proj"]}
    shapes |= {"down_proj.weight": (HIDDEN, INTER), "norm.weight": (HIDDEN,)}
    shapes |= {f"{name}.weight": (VOCABULARY, HIDDEN) for name in ("embed_tokens", "lm_head")}
    for expert in range(EXPERTS):
        shapes |= {f"experts.{expert}.w13_weight": (2 * INTER, HIDDEN), f"experts.{expert}.w2_weight": (HIDDEN, INTER)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def refit(config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`refit(model, tensors, how=...)`: one weight update, a tensor a bucket unless said otherwise."""
    import torch

    from flashrl_cli.plugins import refit as in_place
    from flashrl_cli.plugins import refit as module
    from flashrl_cli.plugins.coverage import Coverage
    from flashrl_cli.plugins.linear import Int8OnlineLinearMethod

    # as on CUDA: a CPU's packed copy takes the place of a floating weight
    for method in in_place.AS_LOADED:
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)
    monkeypatch.setattr(Int8OnlineLinearMethod, "choose_kernel", lambda self, layer: Plain())
    monkeypatch.setattr(Int8OnlineLinearMethod, "row_kernels", frozenset({"Plain"}))

    def run(
        model: Any, tensors: Any, how: str, *, tied: bool = False, watched: bool | None = True, size: int = 1
    ) -> Any:
        coverage = Coverage(model, ties_head=tied, watched=watched)
        listed = list(tensors.items() if isinstance(tensors, dict) else tensors)

        def stream(load: Any) -> None:
            for start in range(0, len(listed), size):
                with coverage.noting():
                    load(coverage.bucket(listed[start : start + size]))

        if how == LAYERWISE:
            untied = SimpleNamespace(hf_config=SimpleNamespace(), dtype=torch.bfloat16)
            module.layerwise(model, untied, torch.device("cpu"), stream)
        else:
            with in_place.in_place(model, coverage.landed) as coverage.rows:
                stream(model.load_weights)
        coverage.check()
        return coverage

    return run


@HOW
@BITS
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_complete_update_passes(refit: Any, how: str, quantized: bool, tied: bool) -> None:
    """One tensor at a time, all at once, in another order, and a head that a tied model passes over."""
    model = engine_model(quantized=quantized, tied=tied)
    for seed, size in ((1, 1), (2, 100)):
        coverage = refit(model, trained(seed), how, tied=tied, size=size)
        assert coverage._landed == set(trained(seed)) - ({"lm_head.weight"} if tied else set())
    refit(model, dict(reversed(trained(3).items())), how, tied=tied)
    if tied:
        refit(model, {name: t for name, t in trained(4).items() if name != "lm_head.weight"}, how, tied=tied)


@HOW
@BITS
def test_each_tensor_that_is_left_out_is_named(refit: Any, how: str, quantized: bool) -> None:
    """A shard of a fused weight or bias, an embedding, a head, a norm, an expert; also where another shard comes twice
    in its place.
    """
    from flashrl_cli.plugins.coverage import Incomplete

    fused = {part: whole for whole, parts in PACKED.items() for part in parts}
    for name in trained(0):
        part, _, kind = name.partition(".")
        where = f"experts.{kind[2:]}" if part == "experts" else f"{fused.get(part, part)}.{kind}"
        model = engine_model(quantized=quantized)
        rest = [(other, tensor) for other, tensor in trained(1).items() if other != name]
        # the layerwise reload has no loader any more for what it has quantized
        for sent in (rest,) if quantized and how == LAYERWISE else (rest, [*rest, *rest]):
            with pytest.raises(Incomplete, match=f"left 1 parameter of the engine unwritten: {where}$"):
                refit(model, sent, how)
    with pytest.raises(Incomplete, match="brought no tensor"):
        refit(model, {}, how)


@HOW
def test_many_are_counted_and_the_first_are_named(refit: Any, how: str) -> None:
    from flashrl_cli.plugins.coverage import Incomplete

    with pytest.raises(
        Incomplete, match=r"left 8 parameters .*: down_proj.weight, embed_tokens.weight, .* and others$"
    ):
        refit(engine_model(quantized=False), {"norm.weight": trained(1)["norm.weight"]}, how)


@HOW
@BITS
def test_an_engine_is_trusted_again_after_a_complete_update(refit: Any, how: str, quantized: bool) -> None:
    import torch

    from flashrl_cli.plugins.coverage import Incomplete

    model, fresh = (engine_model(quantized=quantized) for _ in range(2))
    torn = trained(1)
    del torn["k_proj.weight"]
    with pytest.raises(Incomplete):
        refit(model, torn, how)
    for one in (model, fresh):
        refit(one, trained(2), how)
    for (name, ours), theirs in zip(model.named_parameters(), fresh.parameters(), strict=True):
        filled = slice(None if "experts" not in name else HIDDEN if "w13" in name else INTER)
        assert torch.equal(ours[..., filled], theirs[..., filled]), name


@HOW
def test_later_updates_are_held_against_a_complete_one_by_name_and_shape(refit: Any, how: str) -> None:
    from flashrl_cli.plugins.coverage import Incomplete

    model = engine_model(quantized=True)
    assert refit(model, trained(1), how, watched=None)._writes is not None
    assert refit(model, trained(2), how, watched=None)._writes is None
    torn = trained(3)
    del torn["v_proj.bias"], torn["norm.weight"]
    with pytest.raises(Incomplete, match=r"lacked 2 tensors that the one before it brought: norm.weight, v_proj.bias$"):
        refit(model, torn, how, watched=None)
    assert refit(model, trained(4), how, watched=None)


@HOW
def test_what_has_no_place_in_the_engine_is_refused(refit: Any, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """A bias that vLLM would drop, names that no layer has, another shape; a warning for what is skipped by design."""
    import torch

    from flashrl_cli.plugins.coverage import Incomplete

    model = engine_model(quantized=False)
    with pytest.raises(Incomplete, match=r"the engine has no place for 1 tensor of the weight update: up_proj.bias$"):
        refit(model, {**trained(1), "up_proj.bias": torch.zeros(INTER)}, how)
    strange = {
        "module.norm.weight": torch.zeros(HIDDEN),
        "q_proj.weight": torch.zeros(1, 1),
        "norm.weight": torch.zeros(3),
    }
    for name, tensor in strange.items():
        with pytest.raises(Incomplete, match=f"the engine refused the weight update near {name}: "):
            refit(engine_model(quantized=False), {**trained(1), name: tensor}, how)
    assert not caplog.messages
    head = {**trained(1), "norm.bias": torch.zeros(1), "rotary_emb.bias": torch.zeros(1)}
    refit(model if how == IN_PLACE else engine_model(quantized=False), head, how)
    assert caplog.messages == ["the engine does not use 1 tensor of the weight update: norm.bias"]


def test_counting_ends_with_the_load(refit: Any) -> None:
    """Scales of a KV cache are no weights, and what the engine itself copies later counts for nothing."""
    import torch

    from flashrl_cli.plugins.coverage import Coverage, Incomplete

    model = engine_model(quantized=False)
    model.attention = torch.nn.Module()
    model.attention.kv_cache_dtype = "fp8"
    model.attention.register_parameter("k_scale", torch.nn.Parameter(torch.ones(1), requires_grad=False))
    refit(model, trained(1), IN_PLACE)
    coverage = Coverage(model, ties_head=False, watched=True)
    with coverage.noting():
        model.load_weights(coverage.bucket(list(trained(1).items())[1:]))
        model.qkv_proj.weight.data.copy_(model.qkv_proj.weight.data.view(-1, HIDDEN))
    model.qkv_proj.weight.data.copy_(torch.zeros_like(model.qkv_proj.weight))
    with pytest.raises(Incomplete, match=r"qkv_proj\.weight"):
        coverage.check()


def test_vllms_own_load_of_a_folder_is_checked(refit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads quantized folders, whose tensors it does not compare itself."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from flashrl_cli.plugins.coverage import Incomplete, check_first_load

    def load(self: Any, model: Any, model_config: Any) -> None:
        model.load_weights(model_config.tensors.items())

    monkeypatch.setattr(DefaultModelLoader, "load_weights", load)
    check_first_load()
    checked = DefaultModelLoader.load_weights
    check_first_load()
    assert DefaultModelLoader.load_weights is checked
    whole = trained(1)
    checked(None, engine_model(quantized=False), SimpleNamespace(tensors=whole))
    torn = {name: tensor for name, tensor in whole.items() if name != "up_proj.weight"}
    with pytest.raises(Incomplete, match=r"unwritten: gate_up_proj\.weight$"):
        checked(None, engine_model(quantized=False), SimpleNamespace(tensors=torn))

"""Logits in float32: equal to a float32 product of the same weights, with tied and untied heads, before and after a
refit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing vLLM warns of much that is not ours."""

if TYPE_CHECKING:
    import torch

VOCABULARY, HIDDEN, TOKENS = 200, 96, 7
"""The vocabulary is padded to a multiple of 64."""


class Model:
    """An embedding, a head and a logits processor, as a model of vLLM's builds and loads them."""

    def __init__(self, *, tied: bool, quantized: bool) -> None:
        import torch
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from flashrl_cli.plugins.linear import Int8OnlineConfig

        options: dict[str, Any] = {"params_dtype": torch.bfloat16}
        options["quant_config"] = Int8OnlineConfig() if quantized else None
        self.module = torch.nn.Module()
        self.module.embed_tokens = VocabParallelEmbedding(VOCABULARY, HIDDEN, prefix="embed_tokens", **options)
        self.module.lm_head = ParallelLMHead(VOCABULARY, HIDDEN, prefix="lm_head", **options)
        if tied:
            self.module.lm_head = self.module.lm_head.tie_weights(self.module.embed_tokens)
        self.module.logits_processor = LogitsProcessor(VOCABULARY)
        self.tied = tied

    def load(self, weight: torch.Tensor) -> None:
        """Into the embedding of a tied head, as checkpoints do; the kernel of the CPU build packs a copy of it."""
        head = self.module.lm_head
        parameter = self.module.embed_tokens.weight if self.tied else head.weight
        parameter.weight_loader(parameter, weight)
        head.quant_method.process_weights_after_loading(head)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.module.logits_processor(self.module.lm_head, hidden)
        return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's configuration and groups for one process without an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as groups

    with set_current_vllm_config(VllmConfig()):
        where = f"file://{tmp_path_factory.mktemp('group')}/store"
        groups.init_distributed_environment(1, 0, where, 0, backend="gloo")
        groups.initialize_model_parallel()
        yield
        groups.destroy_model_parallel()
        groups.destroy_distributed_environment()


@pytest.fixture
def layers(config: None) -> Iterator[dict[str, Any]]:
    """vLLM's table of layers that were replaced from outside, as it was before once the test is over."""
    from vllm.model_executor.custom_op import op_registry_oot

    before = dict(op_registry_oot)
    yield op_registry_oot
    op_registry_oot.clear()
    op_registry_oot.update(before)


@pytest.fixture
def float32(layers: dict[str, Any]) -> None:
    """What the plugin does in the processes of a run that asks for it."""
    from flashrl_cli.plugins import linear

    linear.register_float32_head()
    linear.register_float32_head()


def numbers(seed: int, rows: int) -> torch.Tensor:
    import torch

    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.parametrize(("tied", "quantized"), [(False, False), (True, False), (False, True), (True, True)])
def test_logits_are_those_of_float32(float32: None, tied: bool, quantized: bool) -> None:
    import torch

    from flashrl_cli.plugins.linear import head_dtype

    model = Model(tied=tied, quantized=quantized)
    assert head_dtype(model.module) == "fp32"
    hidden = numbers(0, TOKENS)
    for seed in (1, 2):  # loaded, then refitted
        weight = numbers(seed, VOCABULARY)
        model.load(weight)
        found = model.logits(hidden)
        assert (found.dtype, found.shape) == (torch.float32, (TOKENS, VOCABULARY))
        exact = hidden.double() @ weight.double().t()
        assert (found - exact).abs().max() < 1e-4


def test_without_it_logits_are_rounded(layers: dict[str, Any]) -> None:
    """What the float32 head is for: bf16 has 8 bits, so that logits of size 30 are off by up to 0.06."""
    from flashrl_cli.plugins.linear import head_dtype

    assert "LogitsProcessor" not in layers
    model = Model(tied=False, quantized=False)
    assert head_dtype(model.module) == "bf16"
    hidden, weight = numbers(0, TOKENS), numbers(1, VOCABULARY)
    model.load(weight)
    exact = hidden.double() @ weight.double().t()
    assert (model.logits(hidden).double() - exact).abs().max() > 1e-2


def test_ranks_gather_what_each_computes_of_the_vocabulary(float32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = Model(tied=False, quantized=False)
    model.load(numbers(1, VOCABULARY))
    alone = model.logits(numbers(0, TOKENS))
    gathered: list[torch.Tensor] = []

    def gather(part: torch.Tensor) -> torch.Tensor:
        gathered.append(part)
        return part

    monkeypatch.setattr(model.module.lm_head, "tp_size", 2)
    monkeypatch.setattr(model.module.logits_processor, "_gather_logits", gather)
    assert torch.equal(model.logits(numbers(0, TOKENS)), alone)
    assert (gathered[0].dtype, gathered[0].shape[1]) == (torch.float32, 256)
    monkeypatch.setattr(model.module.logits_processor, "_gather_logits", lambda part: None)
    assert model.logits(numbers(0, TOKENS)) is None


def test_a_head_with_other_weights_is_refused(float32: None) -> None:
    model = Model(tied=False, quantized=False)
    model.module.lm_head.quant_method = object()
    with pytest.raises(TypeError, match="floating weights"):
        model.logits(numbers(0, TOKENS))


@pytest.mark.parametrize("asked", [False, True])
def test_the_plugin_does_it_where_the_run_asks(
    layers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    from flashrl_cli import contract
    from flashrl_cli.plugins import vllm_plugin

    monkeypatch.setenv(contract.ENV_PLUGIN_DIR, "/nowhere")
    monkeypatch.setenv(contract.ENV_ROLLOUT, contract.RolloutOptions(lm_head_fp32=asked).text())
    vllm_plugin.register()
    assert ("LogitsProcessor" in layers) == asked

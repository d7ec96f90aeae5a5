"""FP8 in blocks, brought in by verl's own code through vLLM's own layers; only the kernel that multiplies is missing on
a CPU.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing vLLM and verl warns of much that is not ours."""

if TYPE_CHECKING:
    import torch

    Bucket = list[tuple[str, torch.Tensor]]

HIDDEN, INTER, HEADS, KV_HEADS, HEAD = 256, 384, 4, 2, 64
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS: dict[str, tuple[str, Any, int]] = {
    "q_proj": ("qkv_proj", "q", HEADS * HEAD),
    "k_proj": ("qkv_proj", "k", KV_HEADS * HEAD),
    "v_proj": ("qkv_proj", "v", KV_HEADS * HEAD),
    "gate_proj": ("gate_up_proj", 0, INTER),
    "up_proj": ("gate_up_proj", 1, INTER),
    "down_proj": ("down_proj", None, HIDDEN),
}
"""Layer, the shard's id for vLLM's loader, and rows of each weight as a trainer names it."""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A worker without an engine: the extension as vLLM makes it, and three kinds of parallel layers, loaded with
    nothing yet.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", importlib.metadata.version)
        from flashrl_cli.plugins import cpu

        cpu.answer_vllm_version()
        from verl.utils.vllm.vllm_quant_utils import fp8_state
        from verl.workers.rollout.vllm_rollout import utils
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import parallel_state as groups

        patch.setattr(utils, "set_death_signal", lambda: None)
        config = VllmConfig()
        with set_current_vllm_config(config):
            where = f"file://{tmp_path_factory.mktemp('group')}/store"
            groups.init_distributed_environment(1, 0, where, 0, backend="gloo")
            groups.initialize_model_parallel()
            yield _worker(config, patch)
            groups.destroy_model_parallel()
            groups.destroy_distributed_environment()
        while fp8_state.vllm_patches:
            fp8_state.vllm_patches.pop().stop()


def _worker(config: Any, patch: pytest.MonkeyPatch) -> Any:
    import torch
    from vllm.model_executor.kernels import linear as kernels
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.platforms import PlatformEnum

    from flashrl_cli.plugins.verl_blocks import BlocksExtension
    from flashrl_cli.precision import FP8_BLOCK

    class Anywhere(kernels.TritonFp8BlockScaledMMKernel):  # type: ignore[misc]
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

    patch.setitem(kernels._POSSIBLE_FP8_BLOCK_KERNELS, PlatformEnum.CPU, [Anywhere])
    quantized = Fp8Config.from_config(dict(FP8_BLOCK.vllm_config))
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)
    told = SimpleNamespace(quant_config=quantized, speculative_config=None, model_config=config.model_config)
    found = BlocksExtension(vllm_config=told)
    model = _model(quantized)
    for layer in (model.qkv_proj, model.gate_up_proj, model.down_proj):
        layer.quant_method.process_weights_after_loading(layer)
    found.model_runner = SimpleNamespace(model=model, vllm_config=told)
    found.device = torch.device("cpu")
    return found


def _model(quantized: Any) -> Any:
    import torch
    from vllm.model_executor.layers import linear

    class Model(torch.nn.Module):  # type: ignore[misc]
        packed_modules_mapping = PACKED

        def load_weights(self, weights: Any) -> set[str]:
            """As a model's own does."""
            loaded = set()
            for name, weight in weights:
                source, leaf = name.split(".")
                layer, shard, _ = SHARDS[source]
                parameter = getattr(self.get_submodule(layer), leaf)
                parameter.weight_loader(parameter, weight, *([] if shard is None else [shard]))
                loaded.add(f"{layer}.{leaf}")
            return loaded

    options: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": quantized}
    found: Any = Model()
    found.qkv_proj = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix="qkv_proj", **options)
    found.gate_up_proj = linear.MergedColumnParallelLinear(HIDDEN, [INTER] * 2, prefix="gate_up_proj", **options)
    found.down_proj = linear.RowParallelLinear(INTER, HIDDEN, prefix="down_proj", **options)
    return found


def weights(seed: int) -> Bucket:
    """Weights in bf16 whose blocks differ much in size."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, (layer, _, rows) in SHARDS.items():
        columns = INTER if layer == "down_proj" else HIDDEN
        size = torch.rand(rows // 128, columns // 128, generator=generator).repeat_interleave(128, 0)
        values = size.repeat_interleave(128, 1) * torch.randn(rows, columns, generator=generator)
        found.append((f"{name}.weight", values.bfloat16()))
    return found


def in_one(weights: Bucket) -> Callable[[Callable[[Bucket], None]], None]:
    return lambda load: load(list(weights))


def in_reused_memory(weights: Bucket) -> Callable[[Callable[[Bucket], None]], None]:
    """One weight a bucket, each spoilt once it was loaded."""

    def stream(load: Callable[[Bucket], None]) -> None:
        for name, weight in weights:
            buffer = weight.clone()
            load([(name, buffer)])
            buffer.fill_(7.0)

    return stream


def held(model: Any, source: str) -> torch.Tensor:
    """What the engine multiplies with in the place of a weight."""
    layer = model.get_submodule(SHARDS[source][0])
    scales = layer.weight_scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
    whole = layer.weight.float() * scales
    before = [rows for name, (of, _, rows) in SHARDS.items() if of == SHARDS[source][0]]
    place = [name for name, (of, _, _) in SHARDS.items() if of == SHARDS[source][0]].index(source)
    return whole[sum(before[:place]) : sum(before[: place + 1])]


@pytest.mark.parametrize(("seed", "sent"), [(0, in_one), (1, in_reused_memory)])
def test_an_engine_holds_every_weight_in_blocks(worker: Any, seed: int, sent: Any) -> None:
    model = worker.model_runner.model
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert worker._renew(sent(weights(seed)), reused=True) > 0
    assert [parameter.data_ptr() for parameter in model.parameters()] == places, "CUDA graphs hold these addresses"
    for name, weight in weights(seed):
        blocks = weight.float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        off = (held(model, name.split(".")[0]) - weight.float()).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        largest = blocks.abs().amax((1, 3))
        # 3 bits of mantissa: half a step is a 16th of a value, and the largest in its block is 448 times the scale
        assert (off.abs().amax((1, 3)) <= largest / 16).all(), name
        assert (off.abs().amax((1, 3)) > 0).all(), f"{name} was not quantized"


def test_an_update_that_lacks_a_shard_fails(worker: Any) -> None:
    """Counted where it is loaded, and later by the names that a complete one had."""
    from flashrl_cli.plugins.coverage import Incomplete

    torn = [(name, weight) for name, weight in weights(2) if name != "k_proj.weight"]
    with pytest.raises(Incomplete, match=r"left 2 parameters .*: qkv_proj\.weight, qkv_proj\.weight_scale_inv$"):
        worker._renew(in_one(torn), watched=True)
    worker._renew(in_one(weights(2)))
    with pytest.raises(Incomplete, match=r"lacked 1 tensor that the one before it brought: k_proj\.weight$"):
        worker._renew(in_one(torn))


def test_what_it_holds_is_told(worker: Any) -> None:
    from flashrl_cli.bench.job import Variant

    holds = {**worker.holds(), "lm_head": "bf16"}  # the layers have no head
    counted = [holds[name] for name in ("precision", "quantized_layers", "linear_layers", "kernel")]
    assert counted == ["fp8-block", 3, 3, "Anywhere"]
    assert holds["quantized_bytes"] == sum(weight.numel() for _, weight in weights(0))
    assert Variant(precision="fp8-block").contradiction(holds) is None
    assert Variant(precision="fp8").contradiction(holds)

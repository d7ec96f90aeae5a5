"""Rotated INT8 on layers and models with planted outliers: near the exact product where plain INT8 is far from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flashrl_cli import contract
from tests.integration.test_online_linear import config, turned  # noqa: F401 - the first is a fixture
from tests.integration.test_smoothing import TEXT, by_row, off, planted

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing vLLM warns of much that is not ours."""

ROWS, WIDTH, OUTPUTS = 24, 192, 64


def layer(rotation: int | str, weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's linear layer, with vLLM's INT8 kernel for this CPU, that holds `weight` [OUTPUTS, WIDTH]."""
    import torch
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from flashrl_cli.plugins.linear import Int8OnlineConfig

    monkeypatch.setenv(contract.ENV_ROLLOUT, contract.RolloutOptions(rotation=rotation).text())
    kind = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": Int8OnlineConfig(), "prefix": "a"}
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
    try:
        found = ReplicatedLinear(WIDTH, OUTPUTS, return_bias=False, **kind)
        found.weight.weight_loader(found.weight, weight)
    finally:
        torch.set_default_dtype(torch.float32)
    return found


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [ROWS, WIDTH] with two outlier channels, whose weights are small as they are in language models."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, WIDTH, generator=generator) for count in (ROWS, OUTPUTS))
    x[:, [3, 100]] *= 60
    weight[:, [3, 100]] /= 60
    return x.bfloat16(), weight.bfloat16()


def test_compiled_models_are_cached_by_rotation_and_ignored_layers(
    config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's hash passes over the configuration of a quantization, and over `hf_overrides`, which brings `ignore`."""
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    from flashrl_cli.plugins.linear import Int8OnlineConfig

    hashes = set()
    one = ReplicatedLinear(WIDTH, OUTPUTS, bias=False)
    for rotation, ignored in ((0, []), (64, []), (64, ["b"])):
        monkeypatch.setenv(contract.ENV_ROLLOUT, contract.RolloutOptions(rotation=rotation).text())
        found = Int8OnlineConfig(ignored)
        assert not isinstance(found.get_quant_method(one, "a"), UnquantizedLinearMethod)
        assert isinstance(found.get_quant_method(one, "b"), UnquantizedLinearMethod) is bool(ignored)
        hashes.add(config.compute_hash())
    assert len(hashes) == 3


def test_the_kernel_gets_what_was_rotated(
    config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    if not torch.cpu._is_vnni_supported():
        pytest.skip("sums in 16 bits saturate: the kernel is further from the exact product than the rounding")
    x, weight = inputs()
    exact = x.double() @ weight.double().t()
    # the product of what the roundings leave, by the definition; 192 is 3 times 64
    by_hand = 64 * by_row(turned(x, 64)) @ by_row(turned(weight, 64)).t()
    plain, rotated = (layer(rotation, weight, monkeypatch) for rotation in (0, contract.AUTO))
    assert (plain.quant_method.block, rotated.quant_method.block) == (0, 64)
    found = rotated(x)
    assert (found.dtype, found.shape) == (torch.bfloat16, (ROWS, OUTPUTS))
    assert torch.equal(rotated(x[None])[0], found)
    assert off(found, by_hand) < 0.004, "bf16 rounds the result by up to 2^-9 of it"
    assert off(found, exact) < off(plain(x), exact) / 3


@pytest.mark.parametrize(
    ("rotation", "message"), [(128, "blocks of 128 do not divide the 192 input channels of a on a rank"), (64, None)]
)
def test_a_block_that_does_not_divide_an_input_is_refused(
    config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    rotation: int,
    message: str | None,
) -> None:
    if message is None:
        assert layer(rotation, inputs()[1], monkeypatch).quant_method.block == rotation
        return
    with pytest.raises(ValueError, match=message):
        layer(rotation, inputs()[1], monkeypatch)


def test_compiled_models_are_cached_apart(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """vLLM finds a compiled model by a hash of its configuration, which otherwise is that of any rotation."""
    hashes = set()
    for rotation in (0, 32, contract.AUTO):
        layer(rotation, inputs()[1], monkeypatch)
        hashes.add(config.compute_hash())
    assert len(hashes) == 3


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 in which some channels are much larger than others wherever a linear layer reads."""
    return planted("qwen2 tied", tmp_path_factory.mktemp("outliers") / "model")


def logprobs(folder: Path, block: int | None) -> torch.Tensor:
    """Log-probs of the vocabulary by Transformers in float32, exact or with linear layers as INT8 rollouts have them.

    Weights and activations are rounded by the functions of the rollout, and multiplied in float32 rather than by a
    kernel, whose sums depend on the CPU.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from flashrl_cli.plugins.linear import Int8OnlineLinearMethod

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    method = Int8OnlineLinearMethod()
    method.block = block or 0

    def rounded(values: torch.Tensor) -> torch.Tensor:
        rows = torch.empty_like(values, dtype=torch.int8)
        scales = torch.empty(values.shape[0], 1)
        method.quantize(values, rows, scales)
        return rows * scales

    def hook(_: Any, given: Any) -> tuple[torch.Tensor]:
        # what is a weight's row is divided by the block
        return (rounded(given[0][0])[None] * max(1, method.block),)

    with torch.no_grad():
        for name, module in model.model.named_modules():
            if block is not None and name.endswith("_proj"):
                module.register_forward_pre_hook(hook)
                module.weight.copy_(rounded(module.weight))
        found: torch.Tensor = model(input_ids=torch.tensor([TEXT])).logits[0].log_softmax(-1)
    return found


def test_a_rotation_brings_a_model_with_outliers_near_its_trainer(outliers: Path) -> None:
    exact = logprobs(outliers, None)

    def kl(block: int) -> float:
        return float((exact.exp() * (exact - logprobs(outliers, block))).sum(-1).mean())

    plain, rotated = kl(0), kl(32)
    print(plain, rotated)
    assert rotated < plain / 5, f"{plain} and {rotated}"

"""INT8 W8A8 linear layers, quantized while the weights are loaded: the method that vLLM has for experts but not for dense layers.

Weights: symmetric, one scale per output channel, scale = max|w| / 127. Activations: symmetric, one scale per token, computed by the
kernel. Both are the scheme of LLM.int8()'s vector-wise quantization (Dettmers et al., 2022, arXiv 2208.07339, section 2) without its
outlier path. Shaped after vLLM's online FP8 methods (vllm/model_executor/layers/quantization/online/fp8.py), so that loading and
reloading work layer by layer; the GEMM is vLLM's own (CUTLASS on CUDA, oneDNN or AMX on the CPU).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from flashrl_cli import contract

DONE = "_already_called_process_weights_after_loading"
"""vLLM's own marker that a layer is processed (vllm/model_executor/model_loader/reload/layerwise.py)."""


def quantize_per_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 weight [N, K] and float32 scales [N, 1] of a floating weight [N, K]; an all-zero row gets a tiny scale."""
    if weight.is_cuda:
        from vllm import _custom_ops as ops

        quantized, scale, _ = ops.scaled_int8_quant(weight.contiguous(), symmetric=True)
        return quantized, scale
    scale = (weight.abs().amax(dim=1, keepdim=True).float() / 127).clamp_min(1e-8)
    return (weight.float() / scale).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8OnlineLinearMethod(LinearMethodBase):
    """Loads a floating weight on the meta device, and holds it as INT8 once the layer is complete."""

    uses_meta_device = True

    def __init__(self) -> None:
        self.int8_bytes = 0

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the unloaded weight [sum(output sizes), input size] and choose the kernel."""
        layer.logical_widths = output_partition_sizes
        layer.orig_dtype = params_dtype
        self.kernel = init_int8_linear_kernel(
            is_channelwise=True,
            is_static_input_scheme=False,
            input_symmetric=True,
            module_name=type(self).__name__,
        )
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, device="meta", dtype=params_dtype)
        loader = extra_weight_attrs.get("weight_loader")
        weight = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the floating weight by INT8 and hand it to the kernel; a second call does nothing."""
        if getattr(layer, DONE, False):
            return
        quantized, scale = quantize_per_channel(layer.weight)
        self.int8_bytes = quantized.numel()
        del layer.weight
        layer.register_parameter("weight", torch.nn.Parameter(quantized, requires_grad=False))
        layer.register_parameter("weight_scale", torch.nn.Parameter(scale, requires_grad=False))
        for name in ("input_scale", "input_zero_point", "azp_adj"):
            layer._parameters.pop(name, None)
            layer.register_parameter(name, None)
        self.kernel.process_weights_after_loading(layer)
        # oneDNN's handle keeps a raw pointer to these, and a reload puts other tensors in their place:
        # without a reference of our own all log-probs are NaN after the second refit
        self._kernel_operands = [scale, layer.weight_scale, layer.azp_adj]
        setattr(layer, DONE, True)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times the INT8 weight: [..., N], in x's dtype."""
        return self.kernel.apply_weights(layer, x, bias)


class Int8OnlineConfig(QuantizationConfig):
    """Every linear layer INT8, except `ignore` patterns; lm_head, embeddings and experts stay as they are."""

    def __init__(self, ignore: list[str] | None = None) -> None:
        super().__init__()
        self.ignore = ignore or []

    @classmethod
    def get_name(cls) -> str:
        """Name to pass as vLLM's `quantization`."""
        return contract.INT8_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Activation dtypes that the kernels take."""
        return [torch.bfloat16, torch.half]

    @classmethod
    def get_min_capability(cls) -> int:
        """Turing (7.5): the first with INT8 tensor cores."""
        return 75

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """None: the method needs no file beside the checkpoint."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Int8OnlineConfig:
        """Build from `hf_overrides.quantization_config`; `ignore` lists layer names or `re:` patterns."""
        return cls(ignore=list(config.get("ignore", [])))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethodBase | None:
        """INT8 for linear layers, vLLM's default for the rest."""
        if not isinstance(layer, LinearBase):
            return None
        if should_ignore_layer(prefix, ignore=self.ignore, fused_mapping=self.packed_modules_mapping):
            return UnquantizedLinearMethod()
        return Int8OnlineLinearMethod()

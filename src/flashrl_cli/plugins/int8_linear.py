"""INT8 W8A8 linear layers, quantized while the weights are loaded: the method that vLLM has for experts but not for dense layers.

scale = max|w| / 127 per output channel; weights and activations both follow LLM.int8()'s vector-wise quantization (Dettmers et al., 2022,
arXiv 2208.07339, section 2) without its outlier path. The GEMM is CUTLASS on CUDA, oneDNN or AMX on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear import init_int8_linear_kernel

from flashrl_cli import contract
from flashrl_cli.plugins.online_linear import OnlineConfig, OnlineLinearMethod


class Int8OnlineLinearMethod(OnlineLinearMethod):
    """INT8 weights with vLLM's kernel for the platform."""

    precision = "int8"
    dtype = torch.int8
    row_kernels = frozenset({"CutlassInt8ScaledMMLinearKernel"})

    def choose_kernel(self, layer: torch.nn.Module) -> Any:
        """The INT8 kernel for channel-wise weights and dynamic activations."""
        return init_int8_linear_kernel(
            is_channelwise=True,
            is_static_input_scheme=False,
            input_symmetric=True,
            module_name=type(self).__name__,
        )

    def quantize(self, weight: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """One pass of vLLM's kernel for activations on CUDA, the same in PyTorch elsewhere; an all-zero row gets a tiny scale."""
        if weight.is_cuda:
            # what vllm/_custom_ops.py:scaled_int8_quant calls, which allocates its outputs
            torch.ops._C.dynamic_scaled_int8_quant(rows, weight, scales, None)
            return
        scales.copy_((weight.abs().amax(dim=1, keepdim=True).float() / 127).clamp_min(1e-8))
        rows.copy_((weight.float() / scales).round_().clamp_(-127, 127))

    def hand_over(self, layer: torch.nn.Module, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Weight [N, K], which the kernel transposes (CUTLASS) or packs (oneDNN)."""
        layer.register_parameter("weight", torch.nn.Parameter(rows, requires_grad=False))
        layer.register_parameter("weight_scale", torch.nn.Parameter(scales, requires_grad=False))
        for name in ("input_scale", "input_zero_point", "azp_adj"):
            layer._parameters.pop(name, None)
            layer.register_parameter(name, None)
        self.kernel.process_weights_after_loading(layer)
        # oneDNN's handle keeps a raw pointer to these, and a reload puts other tensors in their place:
        # without a reference of our own all log-probs are NaN after the second refit
        self._kernel_operands = [scales, layer.weight_scale, layer.azp_adj]


class Int8OnlineConfig(OnlineConfig):
    """INT8 for every linear layer."""

    method = Int8OnlineLinearMethod

    @classmethod
    def get_name(cls) -> str:
        """Name to pass as vLLM's `quantization`."""
        return contract.INT8_METHOD

    @classmethod
    def get_min_capability(cls) -> int:
        """Turing (7.5): the first with INT8 tensor cores."""
        return 75

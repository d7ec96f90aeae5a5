"""FP8 W8A8 linear layers with one scale per output channel, quantized while the weights are loaded.

float8_e4m3, scale = max|w| / 448: the scheme of vLLM's own online method `fp8_per_channel` (Fp8PtpcOnlineLinearMethod,
vllm/model_executor/layers/quantization/online/fp8.py:283 in 0.24). vLLM's later versions make the scale in several passes and share it
among tensor-parallel ranks; here it is one pass over each rank's rows, so that a refit can write them as they arrive.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticChannelSym

from flashrl_cli import contract
from flashrl_cli.plugins.online_linear import OnlineConfig, OnlineLinearMethod


class Fp8OnlineLinearMethod(OnlineLinearMethod):
    """FP8 weights per channel, FP8 activations per token."""

    precision = "fp8"
    dtype = torch.float8_e4m3fn
    row_kernels = frozenset({"CutlassFP8ScaledMMLinearKernel"})

    def choose_kernel(self, layer: torch.nn.Module) -> Any:
        """The FP8 kernel; Marlin's would compute with 16-bit activations, which is not what was asked for."""
        kernel = init_fp8_linear_kernel(
            activation_quant_key=kFp8DynamicTokenSym,
            weight_quant_key=kFp8StaticChannelSym,
            weight_shape=layer.weight.shape,
            input_dtype=layer.orig_dtype,
            out_dtype=layer.orig_dtype,
            module_name=type(self).__name__,
        )
        if "Marlin" in type(kernel).__name__:
            raise ValueError("FP8 activations need compute capability 8.9 or newer; vLLM offers 16-bit ones only here")
        return kernel

    def quantize(self, weight: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """One pass of vLLM's kernel for activations, which vllm/_custom_ops.py:scaled_fp8_quant calls; CUDA only."""
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(rows, weight, scales, None)

    def hand_over(self, layer: torch.nn.Module, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Weight [K, N], column-major; the kernel pads odd shapes itself."""
        layer.register_parameter("weight", torch.nn.Parameter(rows.t(), requires_grad=False))
        layer.register_parameter("weight_scale", torch.nn.Parameter(scales, requires_grad=False))
        layer.input_scale = None
        self.kernel.process_weights_after_loading(layer)


class Fp8OnlineConfig(OnlineConfig):
    """FP8 for every linear layer."""

    method = Fp8OnlineLinearMethod

    @classmethod
    def get_name(cls) -> str:
        """Name to pass as vLLM's `quantization`."""
        return contract.FP8_METHOD

    @classmethod
    def get_min_capability(cls) -> int:
        """Ada (8.9): the first with FP8 tensor cores."""
        return 89

"""Linear layers whose 8-bit weights are made of floating ones while these are loaded: what INT8 and FP8 have in common.

Weights: symmetric, one scale per output channel. Activations: symmetric, one scale per token, computed by the kernel. Shaped after
vLLM's online FP8 methods (vllm/model_executor/layers/quantization/online/fp8.py), so that loading and reloading work layer by layer;
the GEMM is vLLM's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import vllm
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from flashrl_cli import contract
from flashrl_cli.plugins.replica import stays_in_bf16

DONE = "_already_called_process_weights_after_loading"
"""vLLM's own marker that a layer is processed (vllm/model_executor/model_loader/reload/layerwise.py)."""

Loader = Callable[..., None]


class OnlineLinearMethod(LinearMethodBase):
    """Loads a floating weight on the meta device, and holds it in 8 bits once the layer is complete."""

    uses_meta_device = True
    precision: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    row_kernels: ClassVar[frozenset[str]] = frozenset()
    """Kernels that keep weight and scales as `quantize` writes them, transposed at most: those can be written in place."""

    def __init__(self) -> None:
        contract.require_vllm(vllm.__version__)
        self.quantized_bytes = 0
        self.kernel: Any = None
        self._shape: torch.Size | None = None
        """[N, K] of a weight whose rows may be written one shard at a time."""

    @abstractmethod
    def choose_kernel(self, layer: torch.nn.Module) -> Any:
        """vLLM's kernel for the layer, whose weight is there but not loaded."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Write the 8-bit values [N, K] of a contiguous floating weight [N, K] and their float32 scales [N, 1]."""

    @abstractmethod
    def hand_over(self, layer: torch.nn.Module, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Register weight and scales with the layer as the kernel wants them."""

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
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, device="meta", dtype=params_dtype)
        loader = extra_weight_attrs.get("weight_loader")
        weight = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("weight", weight)
        self.kernel = self.choose_kernel(layer)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the floating weight by 8-bit rows and hand it to the kernel; a second call does nothing."""
        if getattr(layer, DONE, False):
            return
        weight = layer.weight.data.contiguous()
        # a model may have put a loader of its own in its place, which could ask more of a weight than rows
        self._shape = weight.shape if original_loader(layer.weight) == layer.weight_loader else None
        rows = torch.empty_like(weight, dtype=self.dtype)
        scales = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
        self.quantize(weight, rows, scales)
        self.quantized_bytes = rows.numel()
        del layer.weight
        self.hand_over(layer, rows, scales)
        setattr(layer, DONE, True)

    def rows(self, layer: torch.nn.Module) -> Rows | None:
        """The layer's weight to write new rows into, None where the kernel keeps it in another form."""
        weight, scales = layer.weight.data.t(), layer.weight_scale.data
        plain = (
            type(self.kernel).__name__ in self.row_kernels and weight.shape == self._shape and weight.is_contiguous()
        )
        return Rows(self, layer.orig_dtype, weight, scales) if plain else None

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times the 8-bit weight: [..., N], in x's dtype."""
        return self.kernel.apply_weights(layer, x, bias)


class Rows:
    """Output channels of an 8-bit weight [N, K], dressed as the parameter that vLLM's loaders copy shards into.

    A loader narrows the weight to the rows of its shard and copies (vllm/model_executor/layers/linear.py, `weight_loader` of each
    layer); here that copy quantizes. A scale belongs to one row, so that the shards of a fused layer may come one by one.
    """

    output_dim = 0
    input_dim = 1

    def __init__(
        self, method: OnlineLinearMethod, dtype: torch.dtype, weight: torch.Tensor, scales: torch.Tensor
    ) -> None:
        self._method, self._dtype = method, dtype
        self._weight, self._scales = weight, scales
        self.shape = weight.shape
        self._parts: dict[int, int] = {}

    @property
    def written(self) -> int:
        """How many rows were written, each counted once."""
        return sum(self._parts.values())

    @property
    def data(self) -> Rows:
        """Itself: there is nothing below it that a loader may write to."""
        return self

    def size(self) -> torch.Size:
        """[N, K]."""
        return self.shape

    def narrow(self, dim: int, start: int, length: int) -> _Part:
        """Rows `start` to `start + length`; columns cannot be written alone, because a scale spans its row."""
        if dim != self.output_dim:
            raise RuntimeError("a loader wants columns of a weight with one scale per row")
        return _Part(self, start, length)

    def copy_(self, source: torch.Tensor) -> None:
        """Quantize all rows from `source` [N, K]."""
        self.write(0, source)

    def write(self, start: int, source: torch.Tensor) -> None:
        """Quantize `source` [M, K] into the rows from `start` on, in the dtype that a loaded weight would have had."""
        count = source.shape[0]
        source = source.to(self._weight.device, self._dtype).contiguous()
        rows = slice(start, start + count)
        self._method.quantize(source, self._weight[rows], self._scales[rows])
        self._parts[start] = count


class _Part:
    """Some rows of a weight; what a loader gets when it narrows one."""

    def __init__(self, whole: Rows, start: int, length: int) -> None:
        self._whole, self._start = whole, start
        self.shape = torch.Size((length, whole.shape[1]))

    def copy_(self, source: torch.Tensor) -> None:
        """Quantize these rows from `source`."""
        self._whole.write(self._start, source)


def original_loader(parameter: torch.Tensor) -> Loader | None:
    """A parameter's loader without the wrappers of the layerwise reload, which drop what they get outside of one."""
    loader: Any = getattr(parameter, "weight_loader", None)
    while getattr(loader, "__name__", "") == "online_process_loader":
        loader = loader.__wrapped__
    return cast("Loader | None", loader)


class OnlineConfig(QuantizationConfig):
    """Every linear layer in 8 bits, except `ignore` patterns; lm_head, embeddings and experts stay as they are."""

    method: ClassVar[type[OnlineLinearMethod]]

    def __init__(self, ignore: list[str] | None = None) -> None:
        super().__init__()
        self.ignore = ignore or []

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Activation dtypes that the kernels take."""
        return [torch.bfloat16, torch.half]

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """None: the method needs no file beside the checkpoint."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OnlineConfig:
        """Build from `hf_overrides.quantization_config`; `ignore` lists layer names or `re:` patterns."""
        return cls(ignore=list(config.get("ignore", [])))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethodBase | None:
        """8 bits for linear layers, vLLM's default for the rest, and for all in a replica that stays in bf16."""
        if not isinstance(layer, LinearBase):
            return None
        plain = stays_in_bf16() or should_ignore_layer(
            prefix, ignore=self.ignore, fused_mapping=self.packed_modules_mapping
        )
        contract.logger().debug("%s: %s", prefix, "as it is" if plain else self.method.precision)
        return UnquantizedLinearMethod() if plain else self.method()

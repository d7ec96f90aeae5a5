"""Linear layers that a rollout engine quantizes to 8 bits as floating-point weights are loaded, and float32 logits.

Weights are symmetric with one scale per output channel, and activations symmetric with one scale per token, which the
kernel computes. This is the vector-wise quantization of LLM.int8() (Dettmers et al., 2022, arXiv 2208.07339, section 2)
without its outlier path. The code follows vLLM's online FP8 methods
(vllm/model_executor/layers/quantization/online/fp8.py), so that loading and reloading work layer by layer; the GEMM is
vLLM's own.

- INT8: scale = max|w| / 127. vLLM has such a method for experts but not for dense layers. The kernels are CUTLASS on
  CUDA, and oneDNN or AMX on a CPU. The input is rotated by blocks first, unless the run asks for none
  (plugins/rotation.py).
- FP8: float8_e4m3, scale = max|w| / 448, the scheme of vLLM's own online method `fp8_per_channel`
  (Fp8PtpcOnlineLinearMethod, online/fp8.py:283 in 0.24). Later versions of vLLM compute the scale in several passes and
  share it among tensor-parallel ranks. Here it is one pass over each rank's rows, so that a refit can write rows as
  they arrive.

`rollout.mix` keeps some of a run's replicas in bf16. verl gives all replicas the same engine arguments
(verl/workers/rollout/vllm_rollout/vllm_async_server.py:1310). The replicas differ only in an environment variable with
their rank, which each server actor sets before it starts its engine, for the sockets of the weight transfer, and which
all processes of the engine inherit.

`rollout.lm_head_fp32` asks for logits in float32. vLLM computes them in the model's dtype and converts them afterwards
(vllm/v1/sample/sampler.py:97), so that bf16 leaves 8 bits of precision. vLLM's own `head_dtype` provides float32 logits
for generation from 0.28 on; in 0.24 it is for pooling models only (vllm/config/model.py:1671). The logits processor is
replaced through vLLM's hook for out-of-tree layers (vllm/model_executor/custom_op.py, `register_oot`), so that the head
and its weights do not change, whether they are tied, packed, or refitted in place or layer by layer.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import vllm
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel, init_int8_linear_kernel
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticChannelSym
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from flashrl_cli import contract
from flashrl_cli.plugins.rotation import Rotation, quantize_rows, rotated
from flashrl_cli.precision import PRECISIONS

RANK = "VERL_REPLICA_RANK"
"""The replica's number, from 0 (vllm_async_server.py:136; verl's own workers read it in vllm_rollout/utils.py:424)."""
DONE = "_already_called_process_weights_after_loading"
"""vLLM's own marker of a processed layer (vllm/model_executor/model_loader/reload/layerwise.py)."""
CACHE_KEY = "flashrl_linear"
"""Key of vLLM's `additional_config`, of which only a hash is used (vllm/config/vllm.py:476 in 0.24)."""
Loader = Callable[..., None]


class OnlineLinearMethod(LinearMethodBase):
    """Loads a floating-point weight via the meta device, and holds it in 8 bits once the layer is complete."""

    uses_meta_device = True
    precision: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    row_kernels: ClassVar[frozenset[str]] = frozenset()
    """Kernels that keep weight and scales as `quantize` writes them, at most transposed, so that both can be written in
    place.
    """

    def __init__(self, rotation: Rotation | None = None, layer: str = "") -> None:
        contract.require_vllm(vllm.__version__)
        self._rotation = rotation or Rotation()
        self._layer = layer
        self.block = 0
        """Block by which the layer's input is rotated, 0 for none; known when weights are loaded."""
        self.quantized_bytes = 0
        self.kernel: Any = None
        self._shape: torch.Size | None = None
        """Shape [N, K] of a weight whose rows may be written one shard at a time; None for any other weight."""
        self.on_rows: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
        """Called after rows were quantized, with the number of the first one and the arguments of `quantize`."""

    @abstractmethod
    def choose_kernel(self, layer: torch.nn.Module) -> Any:
        """vLLM's kernel for the layer, whose weight is registered but not loaded yet."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Write the 8-bit values [N, K] and float32 scales [N, 1] of a contiguous floating-point weight [N, K]."""

    @abstractmethod
    def hand_over(self, layer: torch.nn.Module, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Register weight and scales with the layer in the kernel's layout."""

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
        self._rotation.include(self._layer, input_size_per_partition)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the floating-point weight by 8-bit rows and pass them to the kernel; a second call does nothing."""
        if getattr(layer, DONE, False):
            return
        self.block = self._rotation.block
        weight = layer.weight.data.contiguous()
        # a model may have replaced the loader by one that needs more of a weight than its rows
        self._shape = weight.shape if original_loader(layer.weight) == layer.weight_loader else None
        rows = torch.empty_like(weight, dtype=self.dtype)
        scales = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
        self.write(0, weight, rows, scales)
        self.quantized_bytes = rows.numel()
        del layer.weight
        self.hand_over(layer, rows, scales)
        setattr(layer, DONE, True)

    def write(self, start: int, weight: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """`quantize` rows of the layer from `start` on, and report them to `on_rows`."""
        self.quantize(weight, rows, scales)
        if self.on_rows:
            self.on_rows(start, weight, rows, scales)

    def rows(self, layer: torch.nn.Module) -> Rows | None:
        """The layer's weight as Rows to write into; None if the kernel keeps it in another layout."""
        weight, scales = layer.weight.data.t(), layer.weight_scale.data
        plain = (
            type(self.kernel).__name__ in self.row_kernels and weight.shape == self._shape and weight.is_contiguous()
        )
        return Rows(self, layer.orig_dtype, weight, scales) if plain else None

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x [..., K] by the 8-bit weight: returns [..., N] in x's dtype."""
        return self.kernel.apply_weights(layer, x, bias)


class Rows:
    """Rows (output channels) of an 8-bit weight [N, K], with the interface of a parameter that vLLM's loaders write to.

    A loader narrows the weight to the rows of its shard and copies into them (vllm/model_executor/layers/linear.py,
    `weight_loader` of each layer); here that copy quantizes. Each scale belongs to one row, so the shards of a fused
    layer may arrive one by one.
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
        """Number of rows that were written, each counted once."""
        return sum(self._parts.values())

    @property
    def data(self) -> Rows:
        """The object itself, because loaders write to `parameter.data`."""
        return self

    def size(self) -> torch.Size:
        """Shape [N, K] of the weight."""
        return self.shape

    def narrow(self, dim: int, start: int, length: int) -> _Part:
        """Rows `start` to `start + length`. Raises RuntimeError for columns, because a scale spans its complete row."""
        if dim != self.output_dim:
            raise RuntimeError("a loader wants columns of a weight with one scale per row")
        return _Part(self, start, length)

    def copy_(self, source: torch.Tensor) -> None:
        """Quantize all rows from `source` [N, K]."""
        self.write(0, source)

    def write(self, start: int, source: torch.Tensor) -> None:
        """Quantize `source` [M, K] into the rows from `start` on, cast first to the dtype of an unquantized weight."""
        count = source.shape[0]
        source = source.to(self._weight.device, self._dtype).contiguous()
        rows = slice(start, start + count)
        self._method.write(start, source, self._weight[rows], self._scales[rows])
        self._parts[start] = count


class _Part:
    """Some rows of a weight: the result of a loader's `narrow`."""

    def __init__(self, whole: Rows, start: int, length: int) -> None:
        self._whole, self._start = whole, start
        self.shape = torch.Size((length, whole.shape[1]))

    def copy_(self, source: torch.Tensor) -> None:
        """Quantize these rows from `source`."""
        self._whole.write(self._start, source)


def original_loader(parameter: torch.Tensor) -> Loader | None:
    """A parameter's loader without the wrappers of the layerwise reload, which drop tensors outside of a reload."""
    loader: Any = getattr(parameter, "weight_loader", None)
    while getattr(loader, "__name__", "") == "online_process_loader":
        loader = loader.__wrapped__
    return cast("Loader | None", loader)


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
        """Quantize per row with the kernel for activations on CUDA, or the same arithmetic in PyTorch elsewhere.

        An all-zero row gets a tiny scale.
        """
        if weight.is_cuda and self.block:
            quantize_rows(weight, rows, scales, self.block, 1 / self.block)
            return
        if weight.is_cuda:
            # the kernel behind vllm/_custom_ops.py:scaled_int8_quant, which would allocate its outputs
            torch.ops._C.dynamic_scaled_int8_quant(rows, weight, scales, None)
            return
        if self.block:
            weight = rotated(weight, self.block).div_(self.block)
        scales.copy_((weight.abs().amax(dim=1, keepdim=True).float() / 127).clamp_min(1e-8))
        rows.copy_((weight.float() / scales).round_().clamp_(-127, 127))

    def hand_over(self, layer: torch.nn.Module, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Register the weight [N, K], which the kernel transposes (CUTLASS) or packs (oneDNN)."""
        layer.register_parameter("weight", torch.nn.Parameter(rows, requires_grad=False))
        layer.register_parameter("weight_scale", torch.nn.Parameter(scales, requires_grad=False))
        for name in ("input_scale", "input_zero_point", "azp_adj"):
            layer._parameters.pop(name, None)
            layer.register_parameter(name, None)
        self.kernel.process_weights_after_loading(layer)
        # oneDNN's handle keeps a raw pointer to these, and a reload puts other tensors in their place:
        # without a reference of our own all log-probs are NaN after the second refit
        self._kernel_operands = [scales, layer.weight_scale, layer.azp_adj]

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x [..., K] by the 8-bit weight, both rotated: returns [..., N] in x's dtype.

        Where the kernel takes quantized activations, what is rounded to INT8 is the float32 result of the rotation;
        elsewhere (AMX) it is rounded to x's dtype in between.
        """
        if not self.block:
            return super().apply(layer, x, bias)
        if type(self.kernel).__name__ in self.row_kernels:
            codes, scales = torch.ops.flashrl.rotate_and_quantize(x, self.block)
            return ops.cutlass_scaled_mm(codes, layer.weight, scales, layer.weight_scale, out_dtype=x.dtype, bias=bias)
        turned = rotated(x, self.block)
        handler = getattr(self.kernel, "dnnl_handler", None)
        if handler is None:
            return self.kernel.apply_weights(layer, turned.to(x.dtype), bias)
        codes, scales, _ = ops.onednn_scaled_int8_quant(turned.view(-1, x.shape[-1]))
        product = torch.empty(codes.shape[0], handler.n, dtype=x.dtype)
        ops.onednn_scaled_mm(handler, codes, product, scales, None, layer.azp_adj, bias)
        return product.view(*x.shape[:-1], handler.n)


class Fp8OnlineLinearMethod(OnlineLinearMethod):
    """FP8 weights per channel, FP8 activations per token."""

    precision = "fp8"
    dtype = torch.float8_e4m3fn
    row_kernels = frozenset({"CutlassFP8ScaledMMLinearKernel"})

    def choose_kernel(self, layer: torch.nn.Module) -> Any:
        """The FP8 kernel. Raises ValueError for Marlin's, which would compute with 16-bit activations."""
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
        """Quantize per row with vLLM's activation kernel, as vllm/_custom_ops.py:scaled_fp8_quant does; CUDA only."""
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(rows, weight, scales, None)

    def hand_over(self, layer: torch.nn.Module, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Register the weight [K, N], column-major; the kernel pads odd shapes itself."""
        layer.register_parameter("weight", torch.nn.Parameter(rows.t(), requires_grad=False))
        layer.register_parameter("weight_scale", torch.nn.Parameter(scales, requires_grad=False))
        layer.input_scale = None
        self.kernel.process_weights_after_loading(layer)


class OnlineConfig(QuantizationConfig):
    """Quantizes every linear layer to 8 bits, except `ignore` patterns, lm_head, embeddings and experts."""

    method: ClassVar[type[OnlineLinearMethod]]

    def __init__(self, ignore: list[str] | None = None) -> None:
        super().__init__()
        self.ignore = ignore or []
        asked = contract.RolloutOptions.here().asked_rotation
        self._rotation = Rotation(asked if PRECISIONS[self.method.precision].rotates else 0)

    @classmethod
    def get_name(cls) -> str:
        """Name of the method in vLLM's `quantization`."""
        return str(PRECISIONS[cls.method.precision].method)

    @classmethod
    def get_min_capability(cls) -> int:
        """Minimum compute capability, as vLLM writes it: 89 for 8.9."""
        major, minor = PRECISIONS[cls.method.precision].gpus.least
        return 10 * major + minor

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Activation dtypes that the kernels accept."""
        return [torch.bfloat16, torch.half]

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """An empty list: the method needs no further file of the checkpoint."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OnlineConfig:
        """Create the config from `hf_overrides.quantization_config`; `ignore` lists layer names or `re:` patterns."""
        return cls(ignore=list(config.get("ignore", [])))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethodBase | None:
        """The quantization method of a layer; None, which is vLLM's default, for anything but a linear layer.

        A linear layer is quantized to 8 bits, unless it is ignored or the replica stays in bf16.
        """
        if not isinstance(layer, LinearBase):
            return None
        plain = stays_in_bf16() or should_ignore_layer(
            prefix, ignore=self.ignore, fused_mapping=self.packed_modules_mapping
        )
        contract.logger().debug("%s: %s", prefix, "as it is" if plain else self.method.precision)
        if plain:
            return UnquantizedLinearMethod()
        config = get_current_vllm_config_or_none()
        if config and isinstance(config.additional_config, dict):
            # vLLM caches compiled models by its configuration, which would be the same for all of these
            config.additional_config[CACHE_KEY] = [self._rotation.asked, *self.ignore]
        return self.method(self._rotation, prefix)


class Int8OnlineConfig(OnlineConfig):
    """INT8 for every linear layer."""

    method = Int8OnlineLinearMethod


class Fp8OnlineConfig(OnlineConfig):
    """FP8 for every linear layer."""

    method = Fp8OnlineLinearMethod


CONFIGS: tuple[type[OnlineConfig], ...] = (Int8OnlineConfig, Fp8OnlineConfig)
"""The configs that the plugin registers with vLLM: one for every precision with a flashrl method."""


def stays_in_bf16() -> bool:
    """Whether this process's engine keeps its linear layers in bf16.

    Raises RuntimeError if the run is mixed and the replica has no number.
    """
    count = contract.RolloutOptions.here().bf16_replicas
    if count == 0:
        return False
    rank = os.environ.get(RANK)
    if rank is None:
        raise RuntimeError(f"{count} replicas are to stay in bf16, and {RANK} does not say which this is")
    return int(rank) < count


DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def register_float32_head() -> None:
    """Make every model that is built from now on compute its logits in float32 (idempotent)."""
    contract.require_vllm(vllm.__version__)
    if LogitsProcessor.__name__ not in op_registry_oot:
        LogitsProcessor.register_oot(Float32LogitsProcessor)


class Float32LogitsProcessor(LogitsProcessor):
    """vLLM's logits processor with a float32 product; scale and soft cap are then applied in float32, too."""

    def _get_logits(
        self, hidden_states: torch.Tensor, lm_head: VocabParallelEmbedding, embedding_bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Logits gathered over ranks, without the vocabulary's padding.

        It follows the base class (logits_processor.py:86 in 0.24, :182 in 0.28).
        """
        logits: torch.Tensor | None = float32_logits(lm_head, hidden_states, embedding_bias)
        if lm_head.tp_size > 1:
            logits = self._gather_logits(logits)
        return None if logits is None else logits[..., : self.org_vocab_size]


def float32_logits(
    head: VocabParallelEmbedding, hidden: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply hidden states [..., H] by the head's weight [V, H]: returns float32 logits [..., V].

    A product of two bf16 numbers is exact in float32, and the GPU's bf16 kernel already accumulates in float32; only
    its output was rounded. So it reads the bf16 weights here and returns float32: a float32 copy of the weights would
    take 2 GiB at 7B. Elsewhere both operands are converted at each step. Raises TypeError for a quantized head.
    """
    if not isinstance(head.quant_method, UnquantizedEmbeddingMethod):
        raise TypeError(f"logits in float32 need floating weights, and the lm_head has {type(head.quant_method)}")
    if hidden.is_cuda and hidden.dtype == head.weight.dtype != torch.float32:
        # for bf16 and fp16 only (torch 2.8 and newer); vLLM 0.24 has it in fused_moe/router/gate_linear.py:142
        logits = torch.mm(hidden.reshape(-1, hidden.shape[-1]), head.weight.t(), out_dtype=torch.float32)
        logits = logits.reshape(*hidden.shape[:-1], -1)
        return logits if bias is None else logits + bias.float()
    return torch.nn.functional.linear(hidden.float(), head.weight.float(), None if bias is None else bias.float())


def head_dtype(model: torch.nn.Module) -> str:
    """The dtype in which a model computes logits: `fp32` if all its logits processors do."""
    processors = [layer for layer in model.modules() if isinstance(layer, LogitsProcessor)]
    embeddings = (layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding))
    weights = next((layer.weight.dtype for layer in embeddings), torch.get_default_dtype())
    if processors and all(_is_float32(processor) for processor in processors):
        return DTYPE_NAMES[torch.float32]
    return DTYPE_NAMES.get(weights, str(weights))


def _is_float32(processor: LogitsProcessor) -> bool:
    """Whether a processor computes in float32: flashrl's, or one set so by `hf_overrides` (possible from 0.25 on)."""
    return isinstance(processor, Float32LogitsProcessor) or getattr(processor, "head_dtype", None) == torch.float32

"""Weight updates (refits) of a running vLLM engine in any precision, and the handshake that shows what it holds.

Each tensor of an update passes through the run's smoothing profile, if any, and is recorded for the KV cache's scales
and the completeness check. It is then loaded in one of two ways. In both, a layer may be split across buckets, and CUDA
graphs stay valid.

- In place: directly into the weights that the engine computes with. On CUDA this suffices for most dense models:
  floating-point weights are used as they are loaded, and 8-bit weights have one scale per row, so each shard can be
  quantized into its rows as it arrives.
- By vLLM's layerwise reload (vllm/model_executor/model_loader/reload/layerwise.py), which restores each layer to its
  unloaded form, joins its shards in new memory, quantizes the complete layer and copies the result into the original
  storage. This moves five times as many bytes. It serves all other models (experts, latent attention, vision towers,
  padded kernels), and CPUs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from flashrl_cli import contract
from flashrl_cli.plugins import kv_scales
from flashrl_cli.plugins.coverage import Bucket, Coverage, ties_head
from flashrl_cli.plugins.linear import OnlineLinearMethod, head_dtype, original_loader
from flashrl_cli.weights import Unreadable
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    from flashrl_cli.plugins.arrival import Arrival
    from flashrl_cli.plugins.linear import Loader, Rows

Load = Callable[[Bucket], None]
Stream = Callable[[Load], None]
SMOOTHED = "flashrl_smoothed"
"""Attribute of a model: how many tensors the profile changed at its last refit."""
AS_LOADED = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
"""Methods that use a weight as it is loaded on CUDA (their `process_weights_after_loading` only acts on a CPU)."""


def refit(
    model: torch.nn.Module,
    model_config: Any,
    device: torch.device,
    stream: Stream,
    *,
    reused: bool = False,
    watched: bool | None = None,
    arrival: Arrival | None = None,
) -> float:
    """Refit `model` with a stream of buckets, and return the duration in seconds.

    `stream(load)` must call `load(bucket)` for each bucket of (name, tensor). The profile of this process's
    RolloutOptions is applied to each tensor before it is quantized. `reused` says that the memory of a bucket is
    overwritten after `load` has returned (and its device is synchronized). `watched` is the argument of Coverage.
    `arrival` samples the rows that are quantized. Raises Incomplete if a parameter was not written: the engine then
    holds no valid policy.
    """
    import vllm

    contract.require_vllm(vllm.__version__)
    started = time.perf_counter()
    smoothing, cache = Smoothing(profile_here(), device), kv_scales.of(model, model_config.hf_text_config.model_type)
    coverage = Coverage(model, ties_head=ties_head(model_config), watched=watched)

    def prepared(load: Load) -> None:
        def each(bucket: Bucket) -> None:
            smoothed = smoothing.bucket(coverage.bucket(bucket))
            with coverage.noting():
                load(cache.bucket(smoothed) if cache else smoothed)

        stream(each)

    straight = device.type == "cuda" and writes_in_place(model)
    contract.logger().debug("refit %s begins", "in place" if straight else "layer by layer")
    with arrival.watching() if arrival else nullcontext():
        if straight:
            with in_place(model, coverage.landed) as coverage.rows:
                prepared(model.load_weights)
        else:
            layerwise(model, model_config, device, prepared, reused=reused)
    coverage.check()
    if cache:  # after the layerwise reload, which sets them to 1
        cache.set()
    setattr(model, SMOOTHED, smoothing.finish())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


class Smoothing:
    """Applies a smoothing profile, if any, to one weight update.

    Tensors arrive in memory that verl reuses or that other processes share, so each smoothed tensor is a new one; all
    others pass unchanged. The scales are moved to the device once and stay there.
    """

    def __init__(self, profile: Profile | None, device: torch.device) -> None:
        self._profile, self._device = profile, device
        self._changed: set[str] = set()

    def bucket(self, weights: Bucket) -> Bucket:
        """The bucket, with its tensors smoothed on the engine's device as they are read."""
        return weights if self._profile is None else self._smoothed(weights, self._profile)

    def _smoothed(self, weights: Bucket, profile: Profile) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name not in profile.lengths:
                yield name, tensor
                continue
            self._changed.add(name)
            yield name, profile.apply(name, tensor.to(self._device))

    def finish(self) -> int:
        """Number of tensors that were smoothed.

        Raises Unreadable if a tensor of the profile did not arrive: the engine then holds no valid policy.
        """
        lacking = sorted(self._profile.names - self._changed) if self._profile else []
        if lacking:
            what = f"the weight update lacked {len(lacking)} tensors that the profile smooths, {lacking[0]} among them"
            raise Unreadable(what)
        return len(self._changed)


def profile_here() -> Profile | None:
    """The profile of this process's engine; None without one. Raises Unreadable if it cannot be read."""
    path = contract.RolloutOptions.here().profile
    return None if path is None else _read(Path(path))


@cache
def _read(path: Path) -> Profile:
    return Profile.read(path)


def writes_in_place(model: torch.nn.Module) -> bool:
    """Whether every weight of a model on CUDA can be written in place."""
    return all(_plain(layer) for layer in model.modules())


def _plain(layer: torch.nn.Module) -> bool:
    method = getattr(layer, "quant_method", None)
    if isinstance(method, OnlineLinearMethod):
        return _rows(layer) is not None
    # plain attention only prepares scales of its cache, nothing that depends on weights
    if type(method) in AS_LOADED or type(layer) is Attention:
        return True
    return method is None and not hasattr(layer, "process_weights_after_loading")


def _rows(layer: torch.nn.Module) -> Rows | None:
    method = getattr(layer, "quant_method", None)
    return method.rows(layer) if isinstance(method, OnlineLinearMethod) else None


@contextmanager
def in_place(model: torch.nn.Module, landed: Callable[[], None]) -> Iterator[dict[str, Rows]]:
    """Context in which `model.load_weights` writes directly into the weights that the engine computes with.

    Yields the 8-bit weights by the name of their layer. `landed` is called after each write of their rows.
    """
    open_rows: dict[str, Rows] = {}
    for name, layer in model.named_modules():
        for parameter in layer.parameters(recurse=False):
            if loader := original_loader(parameter):
                parameter.weight_loader = loader
        if rows := _rows(layer):
            open_rows[name] = rows
            layer.weight.weight_loader = _into(rows, layer.weight_loader, landed)
    try:
        with _named_once(model):
            yield open_rows
    finally:
        for name in open_rows:
            del model.get_submodule(name).weight.weight_loader


def _into(rows: Rows, loader: Loader, landed: Callable[[], None]) -> Loader:
    """A weight loader that makes vLLM's own loader write into `rows` instead of the parameter."""

    def load(parameter: torch.Tensor, loaded: torch.Tensor, *shard: object) -> None:
        loader(rows, loaded, *shard)
        landed()

    return load


@contextmanager
def _named_once(model: torch.nn.Module) -> Iterator[None]:
    """Context in which modules list their parameters once instead of for every bucket.

    Each `load_weights` begins with a walk over all modules (vllm/model_executor/models/qwen2.py:437 in 0.24), which is
    half of a refit's time at 32B.
    """
    loading = [module for module in model.modules() if hasattr(module, "load_weights")]
    for module in loading:
        vars(module)["named_parameters"] = cache(partial(_listed, module.named_parameters))
    try:
        yield
    finally:
        for module in loading:
            del vars(module)["named_parameters"]


def _listed(
    named: Callable[..., Iterator[tuple[str, torch.nn.Parameter]]], *args: Any, **options: Any
) -> tuple[tuple[str, torch.nn.Parameter], ...]:
    return tuple(named(*args, **options))


def layerwise(
    model: torch.nn.Module, model_config: Any, device: torch.device, stream: Stream, *, reused: bool = False
) -> None:
    """Refit by vLLM's layerwise reload.

    Its loaders keep tensors until their layer is complete, so tensors in `reused` memory are copied.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    def load(bucket: Bucket) -> None:
        # tensors are read one by one, because coverage records which one is written where
        model.load_weights((name, tensor.clone() if reused else tensor) for name, tensor in bucket)

    with torch.device(device):
        initialize_layerwise_reload(model)
        stream(load)
        finalize_layerwise_reload(model, model_config)
        repack_tied_head(model, model_config)


def repack_tied_head(model: torch.nn.Module, model_config: Any) -> None:
    """Update a tied lm_head for which the kernel keeps a separate packed copy (vLLM's CPU build).

    The layerwise reload sees no weights loaded for a tied head, and leaves the copy of the engine's initial dummy
    weights. The engine would then sample uniformly while every metric looks fine
    (vllm/model_executor/layers/vocab_parallel_embedding.py:61).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if not getattr(model_config.hf_config, "tie_word_embeddings", False):
        return
    heads = [layer for layer in model.modules() if isinstance(layer, ParallelLMHead)]
    embeddings = [layer for layer in model.modules() if type(layer) is VocabParallelEmbedding]
    for head in heads:
        tied = head.tie_weights(embeddings[0])
        tied.quant_method.process_weights_after_loading(tied)


def describe(model: torch.nn.Module, *, device: torch.device, refits: int, refit_s: float) -> contract.Handshake:
    """The Handshake of `model` after a refit, counted from its layers."""
    import vllm
    from vllm.model_executor.layers.linear import LinearBase

    linear = [layer for layer in model.modules() if isinstance(layer, LinearBase)]
    methods = [m for layer in linear if isinstance(m := layer.quant_method, OnlineLinearMethod) and m.quantized_bytes]
    return contract.Handshake(
        host=socket.gethostname(),
        pid=os.getpid(),
        precision=methods[0].precision if methods else "bf16",
        quantized_layers=len(methods),
        linear_layers=len(linear),
        quantized_bytes=sum(m.quantized_bytes for m in methods),
        kernel=type(methods[0].kernel if methods else linear[0].quant_method).__name__,
        vllm=vllm.__version__,
        torch=str(torch.__version__),  # a subclass of str, which vLLM does not send from process to process
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        refits=refits,
        refit_s=round(refit_s, 4),
        lm_head=head_dtype(model),
        kv_cache=kv_scales.precision(model),
        smoothed=getattr(model, SMOOTHED, 0),
        rotation=_rotation(methods),
    )


def _rotation(methods: list[OnlineLinearMethod]) -> int:
    """The block by which all layers rotate their input; 0 if one does not, or if the blocks differ."""
    blocks = {method.block for method in methods}
    return blocks.pop() if len(blocks) == 1 else 0


def log(handshake: contract.Handshake) -> None:
    """Log a refit in one line, at level INFO."""
    contract.logger().info(
        "refit %d took %.3f s: %s, %d of %d linear layers quantized (%d bytes), rotation %d, %s, logits in %s, "
        "KV cache %s",
        handshake.refits,
        handshake.refit_s,
        handshake.precision,
        handshake.quantized_layers,
        handshake.linear_layers,
        handshake.quantized_bytes,
        handshake.rotation,
        handshake.kernel,
        handshake.lm_head,
        handshake.kv_cache,
    )

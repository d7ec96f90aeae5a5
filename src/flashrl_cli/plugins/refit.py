"""New weights for a running vLLM engine, in any precision, and the proof of what the engine then holds.

On CUDA they are written straight into the engine's own where the model allows it (`in_place`). Else vLLM's layerwise reload restores each
layer to its unloaded form, loads it, quantizes it and copies the result into the storage that was there before
(vllm/model_executor/model_loader/reload/layerwise.py). Either way buckets may split a layer, and CUDA graphs stay valid.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from flashrl_cli import contract
from flashrl_cli.plugins import in_place, kv_scales
from flashrl_cli.plugins.coverage import Coverage, ties_head
from flashrl_cli.plugins.float32_head import head_dtype
from flashrl_cli.plugins.online_linear import OnlineLinearMethod
from flashrl_cli.plugins.smoothing import Smoothing, profile_here

Bucket = Iterable[tuple[str, torch.Tensor]]
Load = Callable[[Bucket], None]
Stream = Callable[[Load], None]
SMOOTHED = "flashrl_smoothed"
"""Attribute of a model: how many tensors the profile changed at its last refit."""


def refit(
    model: torch.nn.Module,
    model_config: Any,
    device: torch.device,
    stream: Stream,
    *,
    reused: bool = False,
    watched: bool | None = None,
) -> float:
    """Reload `model` in place; `stream(load)` must call `load(bucket)` for each bucket of (name, tensor). Returns seconds.

    The profile of this process's RolloutOptions is applied to each tensor before it is quantized.
    `reused` says that a bucket's memory holds other weights after `load` has returned (and its device is synchronized).
    `watched` is as Coverage takes it. Raises Incomplete if a parameter was not written: the engine holds no policy then.
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

    within = device.type == "cuda" and in_place.possible(model)
    contract.logger().debug("refit %s begins", "in place" if within else "layer by layer")
    if within:
        with in_place.writable(model, coverage.landed) as coverage.rows:
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


def layerwise(
    model: torch.nn.Module, model_config: Any, device: torch.device, stream: Stream, *, reused: bool = False
) -> None:
    """vLLM's layerwise reload; its loaders keep tensors until their layer is complete, so those of `reused` memory are copied."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    def load(bucket: Bucket) -> None:
        # read one by one, as coverage notes which tensor is written where
        model.load_weights((name, tensor.clone() if reused else tensor) for name, tensor in bucket)

    with torch.device(device):
        initialize_layerwise_reload(model)
        stream(load)
        finalize_layerwise_reload(model, model_config)
        repack_tied_head(model, model_config)


def repack_tied_head(model: torch.nn.Module, model_config: Any) -> None:
    """Give a tied lm_head the new embedding where the kernel keeps a packed copy of its own (vLLM's CPU build).

    The layerwise reload sees no weights loaded for a tied head and leaves the copy made from the engine's first, dummy weights:
    the engine then samples uniformly while every metric looks fine (vllm/model_executor/layers/vocab_parallel_embedding.py:61).
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
    """What `model` holds after a refit, counted from its layers."""
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
    )


def log(shake: contract.Handshake) -> None:
    """Tell of a refit in the log, at level INFO."""
    contract.logger().info(
        "refit %d took %.3f s: %s, %d of %d linear layers quantized (%d bytes), %s, logits in %s, KV cache %s",
        shake.refits,
        shake.refit_s,
        shake.precision,
        shake.quantized_layers,
        shake.linear_layers,
        shake.quantized_bytes,
        shake.kernel,
        shake.lm_head,
        shake.kv_cache,
    )

"""New weights written straight into a running engine's own: no second copy of a layer, and nothing to finish.

vLLM's layerwise reload gathers a layer's floating shards, joins them in new memory, quantizes the whole and copies the result to where the
old weights lie: five times the bytes that must move. On CUDA most dense models need none of it: floating weights are used as they are
loaded, and 8-bit ones have a scale per row, so each shard can be quantized into its rows as it arrives. Models with anything else
(experts, latent attention, vision towers, padded kernels) are left to the layerwise reload.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from flashrl_cli.plugins.online_linear import OnlineLinearMethod, original_loader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from flashrl_cli.plugins.online_linear import Loader, Rows

AS_LOADED = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
"""Methods that use a weight as it is loaded, on CUDA (their `process_weights_after_loading` acts on the CPU only)."""


def possible(model: torch.nn.Module) -> bool:
    """Whether every weight of a model on CUDA can be written where it lies."""
    return all(_plain(layer) for layer in model.modules())


def _plain(layer: torch.nn.Module) -> bool:
    method = getattr(layer, "quant_method", None)
    if isinstance(method, OnlineLinearMethod):
        return _rows(layer) is not None
    # plain attention prepares scales of its cache, and nothing from weights
    if type(method) in AS_LOADED or type(layer) is Attention:
        return True
    return method is None and not hasattr(layer, "process_weights_after_loading")


def _rows(layer: torch.nn.Module) -> Rows | None:
    method = getattr(layer, "quant_method", None)
    return method.rows(layer) if isinstance(method, OnlineLinearMethod) else None


@contextmanager
def writable(model: torch.nn.Module, landed: Callable[[], None]) -> Iterator[dict[str, Rows]]:
    """Within, `model.load_weights` writes into the weights that the engine computes with.

    Yields the 8-bit ones by the name of their layer; `landed` is called whenever rows of one were written.
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
    """A weight loader that has vLLM's own copy into `rows` instead of the parameter."""

    def load(parameter: torch.Tensor, loaded: torch.Tensor, *shard: object) -> None:
        loader(rows, loaded, *shard)
        landed()

    return load


@contextmanager
def _named_once(model: torch.nn.Module) -> Iterator[None]:
    """Within, modules that load weights list their parameters once instead of for every bucket: half of a refit's time at 32B.

    Each `load_weights` begins with a walk over all modules (vllm/model_executor/models/qwen2.py:437 in 0.24).
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

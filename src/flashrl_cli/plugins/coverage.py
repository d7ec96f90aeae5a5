"""Checks that a weight update wrote every parameter of the engine, before the engine generates anything.

vLLM does not fail if an update leaves out parameters: the layerwise reload restores the previous tensors with a warning
(`finalize_layerwise_processing`, vllm/model_executor/model_loader/reload/layerwise.py), and a loader of shards knows
only its own shards. So the elements that loaders copy into each parameter are counted by their position: a shard that
arrives twice does not hide one that is missing. Counting looks at shapes and addresses, never at values. Which elements
are written depends only on the names and shapes that were sent. A later update with the names and shapes of a complete
one is therefore complete, and is not counted again.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from flashrl_cli import contract
from flashrl_cli.plugins.linear import OnlineLinearMethod
from flashrl_cli.text import counted
from flashrl_cli.weights import Unreadable

if TYPE_CHECKING:
    from flashrl_cli.plugins.linear import Rows

Bucket = Iterable[tuple[str, torch.Tensor]]
Sent = frozenset[tuple[str, tuple[int, ...]]]
COMPLETE = "flashrl_complete"
"""Attribute of a model: the names and shapes of the updates that were found complete."""
_SHOWN = 4
_WRITES = (
    torch.ops.aten.copy_.default,
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.fill_.Tensor,
    torch.ops.aten.zero_.default,
)
_MISFIT = re.compile(r"size of tensor|must match|exceeds dimension|shape|sizes? ")
"""Matches the message of torch's RuntimeError for a tensor whose size differs from its destination's."""
_UNUSED = re.compile(r"rotary_(pos_)?emb\.")
"""Buffers that checkpoints may hold and that every engine computes itself."""


class Incomplete(Unreadable):
    """A weight update left parameters of the engine unwritten, or brought tensors that the engine has no place for."""


class Coverage:
    """The coverage of one weight update of `model`, whose lm_head shares the embedding's weight if `ties_head`.

    `watched` says whether writes are counted. None counts them until one update was found complete, and afterwards only
    compares names and shapes.
    """

    def __init__(self, model: torch.nn.Module, *, ties_head: bool, watched: bool | None = None) -> None:
        self._model, self._ties_head = model, ties_head
        self._complete: set[Sent] = vars(model).setdefault(COMPLETE, set())
        self._writes = _Writes() if (not self._complete if watched is None else watched) else None
        self._sent: set[tuple[str, tuple[int, ...]]] = set()
        self._current: str | None = None
        self._landed: set[str] = set()
        self._named: dict[int, dict[str, torch.nn.Parameter]] = {}
        self.rows: Mapping[str, Rows] = {}
        """8-bit weights that are written row by row, by the name of their layer."""

    def bucket(self, weights: Bucket) -> Bucket:
        """Yield the bucket unchanged, recording each tensor as it is read."""
        for name, tensor in weights:
            self._sent.add((name, tuple(tensor.shape)))
            self._current = name
            yield name, tensor
        self._current = None

    def landed(self) -> None:
        """Record that the tensor read last was written to a parameter."""
        if self._current:
            self._landed.add(self._current)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Context in which a bucket is loaded; raises Incomplete for a tensor that the engine refuses."""
        if self._writes and not self._named:  # parameters are ready to be loaded only now
            self._named = self._expected()
            self._writes.into(self._named, self.landed)
        try:
            with self._writes or nullcontext():
                yield
        except (ValueError, KeyError, IndexError, AssertionError) as error:
            raise self._refused(error) from error
        except RuntimeError as error:
            if not _MISFIT.search(str(error)):
                raise
            raise self._refused(error) from error

    def check(self) -> None:
        """Raise Incomplete unless this update wrote all parameters."""
        if not self._sent:
            raise Incomplete("the weight update brought no tensor")
        if torn := [f"{name}.weight" for name, rows in self.rows.items() if rows.written < rows.shape[0]]:
            raise _unwritten(torn)
        sent = frozenset(self._sent)
        if self._writes is None:
            self._compare(sent)
            return
        self.check_written()
        self._refuse_biases()
        self._say_unused()
        self._complete.add(sent)

    def check_written(self) -> None:
        """Raise Incomplete unless all parameters were written while `noting` was active, under whatever names."""
        if missing := sorted(self._missing()):
            raise _unwritten(missing)

    def _compare(self, sent: Sent) -> None:
        """Raise Incomplete if a tensor is missing that an earlier complete update brought."""
        lacking = min((one - sent for one in self._complete), key=len)
        if lacking:
            names = sorted(name for name, _ in lacking)
            what = f"the weight update lacked {counted(len(names), 'tensor')} that the one before it brought"
            raise Incomplete(f"{what}: {_first(names)}")

    def _missing(self) -> Iterator[str]:
        for storage, named in self._named.items():
            parts = self._writes.parts[storage] if self._writes else {}
            if sum(parts.values()) < max(parameter.numel() for parameter in named.values()):
                yield from (name for name, one in named.items() if not _padded_experts(one, parts))

    def _expected(self) -> dict[int, dict[str, torch.nn.Parameter]]:
        """Parameters that an update must write, grouped by their storage, with their names."""
        found: dict[int, dict[str, torch.nn.Parameter]] = defaultdict(dict)
        for prefix, layer in self._model.named_modules():
            if hasattr(layer, "kv_cache_dtype") or (self._ties_head and isinstance(layer, ParallelLMHead)):
                continue  # scales of the KV cache, which the trainer does not send; the embedding under another name
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.numel() and self._is_loaded(prefix, layer, name):
                    found[_storage(parameter)][f"{prefix}.{name}" if prefix else name] = parameter
        return found

    def _is_loaded(self, prefix: str, layer: torch.nn.Module, name: str) -> bool:
        """Whether a parameter is loaded from the trainer, rather than derived from a loaded one."""
        method = getattr(layer, "quant_method", None)
        if prefix in self.rows:
            return name == "bias"
        if method is None or type(method).__name__.startswith("Unquantized"):
            return True
        if isinstance(method, OnlineLinearMethod):
            return name in {"weight", "bias"}
        return name.endswith(("weight", "bias", "packed", "weight_scale", "weight_scale_inv"))

    def _refuse_biases(self) -> None:
        """Raise Incomplete for biases of layers that have none.

        vLLM's loaders silently drop such biases, to tolerate the extra ones of GPTQ checkpoints (models/utils.py,
        `AutoWeightsLoader`).
        """
        packed = getattr(self._model, "packed_modules_mapping", None) or {}
        fused = {part: whole for whole, parts in packed.items() for part in parts}
        layers = dict(self._model.named_modules())

        def without_bias(name: str) -> bool:
            before, _, last = name.removesuffix(".bias").rpartition(".")
            layer = layers.get(".".join(filter(None, (before, fused.get(last, last)))))
            return isinstance(layer, LinearBase) and layer._parameters.get("bias") is None

        found = sorted(name for name, _ in self._sent if name.endswith(".bias") and without_bias(name))
        if found:
            raise Incomplete(
                f"the engine has no place for {counted(len(found), 'tensor')} of the weight update: {_first(found)}"
            )

    def _say_unused(self) -> None:
        """Warn of tensors that were not written to any parameter.

        This is not an error: a pipeline stage and an engine without a model's extra heads rightly leave out many
        tensors.
        """
        if not self._landed:
            return  # the model reads all of a bucket before it loads it
        head = {"lm_head.weight"} if self._ties_head else set()
        names = sorted({name for name, _ in self._sent if not _UNUSED.search(name)} - self._landed - head)
        if names:
            contract.logger().warning(
                "the engine does not use %s of the weight update: %s", counted(len(names), "tensor"), _first(names)
            )

    def _refused(self, error: Exception) -> Incomplete:
        near = f" near {self._current}" if self._current else ""
        return Incomplete(f"the engine refused the weight update{near}: {str(error)[:300] or type(error).__name__}")


class _Writes(TorchDispatchMode):
    """Counts the elements that are written into given storages, by the offset and shape of each write."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[int, dict[tuple[int, tuple[int, ...]], int]] = {}
        self._landed: Any = None

    def into(self, storages: Iterable[int], landed: Any) -> None:
        """Count writes into these storages, and call `landed` at each write."""
        self.parts = {storage: {} for storage in storages}
        self._landed = landed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WRITES and args[0].numel():
            storage = _storage(args[0])
            parts = self.parts.get(storage)
            # the layerwise reload copies parameters that it never unloaded onto themselves
            if parts is not None and not any(_is_part(source, storage) for source in args[1:2]):
                parts[args[0].storage_offset(), tuple(args[0].shape)] = args[0].numel()
                self._landed()
        return func(*args, **(kwargs or {}))


def check_first_load() -> None:
    """Make vLLM's own loader fail if a model's folder leaves a parameter unwritten (idempotent).

    vLLM compares names, not shards, and skips quantized layers (`track_weights_loading`,
    vllm/model_executor/model_loader/default_loader.py:327 in 0.24): unwritten parts keep whatever was in their memory
    before.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    original = DefaultModelLoader.load_weights
    if getattr(original, contract.PATCHED, False):
        return

    def load_weights(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        coverage = Coverage(model, ties_head=ties_head(model_config), watched=True)
        with coverage.noting():
            original(self, model, model_config)
        coverage.check_written()

    setattr(load_weights, contract.PATCHED, True)
    DefaultModelLoader.load_weights = load_weights


def ties_head(model_config: Any) -> bool:
    """Whether a model's lm_head shares the embedding's weight, according to vLLM's ModelConfig."""
    configs = (getattr(model_config, name, None) for name in ("hf_config", "hf_text_config"))
    return any(getattr(config, "tie_word_embeddings", False) for config in configs)


def _storage(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, which its views share, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def _is_part(source: Any, storage: int) -> bool:
    return isinstance(source, torch.Tensor) and _storage(source) == storage


def _padded_experts(parameter: torch.nn.Parameter, parts: Mapping[tuple[int, tuple[int, ...]], int]) -> bool:
    """Whether each expert of a fused weight [experts, rows, columns] received all its shards.

    This holds even if a kernel pads the weight, so that the shards do not fill it. Gate and up projections are shards
    of at most half the rows; a down projection is one shard.
    """
    if parameter.dim() != 3 or not all(len(shape) == 2 for _, shape in parts):
        return False
    counts = [0] * parameter.shape[0]
    for offset, _ in parts:
        counts[offset // parameter.stride(0)] += 1
    halves = all(shape[0] <= parameter.shape[1] // 2 for _, shape in parts)
    return min(counts) >= (2 if halves else 1)


def _unwritten(names: list[str]) -> Incomplete:
    return Incomplete(
        f"the weight update left {counted(len(names), 'parameter')} of the engine unwritten: {_first(names)}"
    )


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" and others" if len(names) > _SHOWN else "")

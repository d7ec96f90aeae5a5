"""vLLM worker extensions of the engines that flashrl starts itself.

They refit an engine with weights read from disk, so that one engine serves every checkpoint of an architecture, and
they take the measurements of `flashrl bench`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from flashrl_cli.plugins.linear import OnlineLinearMethod
from flashrl_cli.plugins.refit import Load, Stream, describe, log, refit
from flashrl_cli.weights import Unreadable, Weights

if TYPE_CHECKING:
    from flashrl_cli import contract

Named = tuple[str, torch.Tensor]
Sizes = tuple[str, tuple[int, ...]]
BUCKET_BYTES = 2**28
"""Bytes of weights that are loaded at a time: the model's loader is called rarely, and needs little extra memory."""
DEVICE_BUCKET_BYTES = {"cuda": 2 << 30, "cpu": 1 << 28}
"""Bytes of a bucket in the benchmark, by device; verl's default on a GPU
(rollout.checkpoint_engine.update_weights_bucket_megabytes).
"""
_WIDTH = 1024
_AT_ONCE = 1 << 25
_SCALE = 0.05


class DiskRefitExtension:
    """vLLM worker extension (`worker_extension_cls`) that reloads weights from disk."""

    def load_from_disk(self, source: dict[str, Any]) -> dict[str, Any]:
        """Refit the engine with the weights `source` (a Weights as plain data), and return its Handshake as plain data.

        If the weights cannot be read, or leave a parameter of the engine unwritten, the result has `unreadable` (the
        reason) and `spoilt` (whether the engine no longer holds a usable policy).
        """
        tensors = Weights.of(source).tensors()
        begun = False
        try:
            # this opens all files, so that most problems show before the engine changes
            first = next(tensors)
            begun = True
            return self._refit(itertools.chain([first], tensors))
        except Unreadable as error:
            return {"unreadable": str(error), "spoilt": begun}

    def _refit(self, tensors: Iterable[Named]) -> dict[str, Any]:
        def stream(load: Load) -> None:
            for bucket in _buckets(tensors):
                load(bucket)

        # names may differ from checkpoint to checkpoint
        handshake = self._describe(refits=1, seconds=self._renew(stream, watched=True))
        log(handshake)
        return asdict(handshake)

    def _renew(self, stream: Stream, *, reused: bool = False, watched: bool | None = None) -> float:
        """Refit the engine with the weights of a stream, as `refit` takes it; returns seconds."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        config = runner.vllm_config.model_config
        return refit(runner.model, config, self._device(), stream, reused=reused, watched=watched)

    def holds(self) -> dict[str, Any]:
        """The engine's Handshake as plain data, without a refit."""
        return asdict(self._describe(refits=0, seconds=0.0))

    def _describe(self, *, refits: int, seconds: float) -> contract.Handshake:
        model = self.model_runner.model  # type: ignore[attr-defined]
        return describe(model, device=self._device(), refits=refits, refit_s=seconds)

    def _device(self) -> torch.device:
        return getattr(self, "device", None) or torch.device("cpu")


def _buckets(tensors: Iterable[Named]) -> Iterator[list[Named]]:
    bucket: list[Named] = []
    size = 0
    for name, tensor in tensors:
        bucket.append((name, tensor))
        size += tensor.nbytes
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


class BenchExtension(DiskRefitExtension):
    """vLLM worker extension (`worker_extension_cls`) of the benchmark's engines."""

    def bench_facts(self) -> dict[str, Any]:
        """This worker's Handshake as `holds`, and the bytes of its weights."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        return {"holds": self.holds(), "weights_bytes": _weights_bytes(model)}

    def bench_fill(self) -> None:
        """Refit with random weights.

        vLLM's dummy loader leaves 8-bit weights uninitialized, and zeros would run faster than a real model.
        """
        self._renew(_Random(_sizes_by_config(self._config()), self._device()).stream, reused=True)

    def bench_refit(self, repeats: int, source: dict[str, Any] | None) -> dict[str, Any]:
        """Durations in seconds of refits with random weights in this device's memory, after one warm-up refit.

        The result also has the extra memory of a refit in bytes (None on a CPU). `source` (a Weights as plain data)
        determines the names and shapes of the weights; without it the model's config does.
        """
        sizes = _sizes_on_disk(source) if source else _sizes_by_config(self._config())
        weights = _Random(sizes, self._device())
        seconds, extra = [], None
        for _ in range(repeats + 1):
            before = _reset_peak(self._device())
            seconds.append(self._renew(weights.stream, reused=True))
            extra = _peak(self._device(), before)
        return {
            "seconds": seconds[1:],
            "extra_bytes": extra,
            "buckets": len(weights.buckets),
            "bytes": weights.bytes,
        }

    def _config(self) -> Any:
        return self.model_runner.vllm_config.model_config.hf_config  # type: ignore[attr-defined]


def _weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, each counted once.

    8-bit weights are counted by their number of elements, because a CPU kernel hides its packed copy.
    """
    stored: dict[int, int] = {}
    hidden = 0
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        quantized = method.quantized_bytes if isinstance(method, OnlineLinearMethod) else 0
        hidden += quantized
        for name, value in layer.named_parameters(recurse=False):
            if not (quantized and name == "weight"):
                stored[value.data_ptr()] = value.nbytes
    return hidden + sum(stored.values())


class _Random:
    """Random bf16 weights of given names and shapes, all of them views of one buffer.

    Their rows differ widely in scale, and every bucket has the same values.
    """

    def __init__(self, sizes: Iterable[Sizes], device: torch.device) -> None:
        self._device = device
        listed = list(sizes)
        counts = [math.prod(size) for _, size in listed]
        # as verl does: a tensor that exceeds the bucket enlarges it
        room = max(*counts, min(sum(counts), DEVICE_BUCKET_BYTES[device.type] // torch.bfloat16.itemsize))
        self.bytes = sum(counts) * torch.bfloat16.itemsize
        self.buckets = list(_packed(listed, room))
        self._buffer = torch.empty(-(-room // _WIDTH) * _WIDTH, dtype=torch.bfloat16, device=device)
        self._fill()

    def stream(self, load: Load) -> None:
        """Load all buckets."""
        for bucket in self.buckets:
            load([(name, self._buffer[first : first + math.prod(size)].view(size)) for name, size, first in bucket])
            if self._device.type == "cuda":
                # as verl's receiver does before it lets the sender fill the buffer again
                torch.cuda.synchronize(self._device)

    def _fill(self) -> None:
        generator = torch.Generator(device=self._device).manual_seed(0)
        for part in self._buffer.split(_AT_ONCE):
            rows = part.view(-1, _WIDTH)
            scale = torch.rand(rows.shape[0], 1, device=self._device, generator=generator) * _SCALE
            rows.copy_(scale * torch.randn(rows.shape, device=self._device, generator=generator))


def _packed(sizes: Iterable[Sizes], room: int) -> Iterator[list[tuple[str, tuple[int, ...], int]]]:
    """Buckets of (name, shape, first element) of at most `room` elements, filled in the order of verl's sender."""
    bucket: list[tuple[str, tuple[int, ...], int]] = []
    offset = 0
    for name, size in sizes:
        if bucket and offset + math.prod(size) > room:
            yield bucket
            bucket, offset = [], 0
        bucket.append((name, size, offset))
        offset += math.prod(size)
    if bucket:
        yield bucket


def _sizes_by_config(config: Any) -> Iterator[Sizes]:
    """Names and shapes of the weights that Transformers gives a model with this config; a tied head is left out."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    yield from ((name, tuple(value.shape)) for name, value in model.named_parameters())


def _sizes_on_disk(source: dict[str, Any]) -> Iterator[Sizes]:
    yield from ((name, stored.shape) for name, stored in Weights.of(source).accounted().items())


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, before: int) -> int | None:
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None

"""New weights for an evaluation engine, read from disk: one engine serves every checkpoint of an architecture."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from flashrl_cli.plugins.refit import Load, Stream, describe, log, refit
from flashrl_cli.weights import Unreadable, Weights

if TYPE_CHECKING:
    from flashrl_cli import contract

BUCKET_BYTES = 2**28
"""Weights handed to vLLM at a time: few calls of the model's loader, and little memory beside the model."""
Named = tuple[str, torch.Tensor]


class DiskRefitExtension:
    """vLLM worker extension (`worker_extension_cls`) that reloads weights from disk."""

    def load_from_disk(self, source: dict[str, Any]) -> dict[str, Any]:
        """Refit the engine with the weights that `source` (a Weights as plain data) names; what it holds then (a Handshake).

        Weights that cannot be read, or that leave a parameter of the engine as it was, give `unreadable` (the reason) and `spoilt`:
        whether the engine is of no use after that.
        """
        tensors = Weights.of(source).tensors()
        begun = False
        try:
            # this opens all files: most that is wrong with them shows here, before the engine is touched
            first = next(tensors)
            begun = True
            return self._refit(itertools.chain([first], tensors))
        except Unreadable as error:
            return {"unreadable": str(error), "spoilt": begun}

    def _refit(self, tensors: Iterable[Named]) -> dict[str, Any]:
        def stream(load: Load) -> None:
            for bucket in _buckets(tensors):
                load(bucket)

        # each checkpoint may have names of its own
        shake = self._describe(refits=1, seconds=self._renew(stream, watched=True))
        log(shake)
        return asdict(shake)

    def _renew(self, stream: Stream, *, reused: bool = False, watched: bool | None = None) -> float:
        """Give the engine the weights of a stream, as `refit` takes it; seconds."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        config = runner.vllm_config.model_config
        return refit(runner.model, config, self._device(), stream, reused=reused, watched=watched)

    def holds(self) -> dict[str, Any]:
        """What the engine holds (a Handshake as plain data) without a refit."""
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

"""Benchmark of block-wise FP8, whose weights are quantized and loaded by verl's own code as in training.

verl's worker extension patches vLLM when it is created, before the engine builds its layers
(verl/workers/rollout/vllm_rollout/utils.py:178 in 0.9.1). Its `update_weights_from_ipc` (:248) takes the same steps as
`_renew` here, with buckets that a trainer sends.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import vllm
from verl.utils.vllm.vllm_quant_utils import prepare_quanted_weights_for_loading, process_quanted_weights_after_loading
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod

from flashrl_cli import contract
from flashrl_cli.plugins.coverage import Coverage, ties_head
from flashrl_cli.plugins.disk_refit import BenchExtension
from flashrl_cli.precision import FP8_BLOCK

if TYPE_CHECKING:
    from flashrl_cli.plugins.coverage import Bucket
    from flashrl_cli.plugins.refit import Stream


class BlocksExtension(BenchExtension, vLLMColocateWorkerExtension):
    """vLLM worker extension (`worker_extension_cls`) of the benchmark's engines with block-wise FP8."""

    def _renew(self, stream: Stream, *, reused: bool = False, watched: bool | None = None) -> float:
        """Run verl's weight update without its transfer; returns seconds.

        It keeps no tensor of a bucket, so `reused` changes nothing.
        """
        contract.require_vllm(vllm.__version__)
        model, device = self.model_runner.model, self._device()
        coverage = Coverage(model, ties_head=ties_head(self.model_runner.vllm_config.model_config), watched=watched)
        started = time.perf_counter()

        def load(bucket: Bucket) -> None:
            # verl receives tensors on the device, where its kernel quantizes them
            here = [(name, tensor.to(device)) for name, tensor in coverage.bucket(bucket)]
            with coverage.noting():
                self._update_weights(here, peft_config=None, base_sync_done=False)

        state = prepare_quanted_weights_for_loading(model)
        stream(load)
        process_quanted_weights_after_loading(model, state)
        coverage.check()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    def _describe(self, *, refits: int, seconds: float) -> contract.Handshake:
        """The Handshake, counted from the layers with block-wise FP8; the base class's if there are none."""
        handshake = super()._describe(refits=refits, seconds=seconds)
        blocks = [layer for layer in self.model_runner.model.modules() if _in_blocks(layer)]
        if not blocks:
            return handshake
        return replace(
            handshake,
            precision=FP8_BLOCK.name,
            quantized_layers=len(blocks),
            quantized_bytes=sum(layer.weight.nbytes for layer in blocks),
            kernel=type(blocks[0].quant_method.fp8_linear).__name__,
        )


def _in_blocks(layer: torch.nn.Module) -> bool:
    method = getattr(layer, "quant_method", None)
    return isinstance(layer, LinearBase) and isinstance(method, Fp8LinearMethod) and method.block_quant

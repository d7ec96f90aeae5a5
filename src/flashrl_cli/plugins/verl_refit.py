"""The weight update of verl's rollout workers: flashrl's refit, with a handshake file.

verl accepts the class by a plain override (`rollout.engine_kwargs.vllm.worker_extension_cls`). verl's own update loads
into the live parameters, which quantized layers and vLLM's CPU build no longer have.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from flashrl_cli import contract
from flashrl_cli.plugins.arrival import Arrival
from flashrl_cli.plugins.coverage import Coverage, ties_head
from flashrl_cli.plugins.refit import Load, describe, log, refit
from flashrl_cli.plugins.vllm_plugin import sleep_beside_others

if os.environ.get(contract.ENV_PLATFORM) == "cuda":
    sleep_beside_others()  # vLLM imports this module in each worker, once it has chosen the class of the worker


class CheckedWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension and weight update, which fails unless every parameter of the engine was written."""

    _coverage: Coverage | None = None

    def update_weights_from_ipc(
        self, peft_config: dict[str, Any] | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> dict[str, float] | None:
        """Receive all buckets of a weight update. Raises Incomplete if they leave a parameter unwritten.

        Returns figures about the update; None if there are none, as with verl's own.
        """
        adapter_alone = peft_config and base_sync_done
        self._coverage = None if adapter_alone else self._new_coverage()
        super().update_weights_from_ipc(peft_config=peft_config, base_sync_done=base_sync_done, use_shm=use_shm)
        if self._coverage:
            self._coverage.check()
        return None

    def _update_weights(
        self, weights: list[tuple[str, torch.Tensor]], peft_config: dict[str, Any] | None, base_sync_done: bool
    ) -> None:
        """Load a bucket with verl's code, recording what is written."""
        if self._coverage is None:
            super()._update_weights(weights, peft_config=peft_config, base_sync_done=base_sync_done)
            return
        noted = list(self._coverage.bucket(weights))
        with self._coverage.noting():
            super()._update_weights(noted, peft_config=peft_config, base_sync_done=base_sync_done)

    def _new_coverage(self) -> Coverage:
        runner = self.model_runner
        return Coverage(runner.model, ties_head=ties_head(runner.vllm_config.model_config))


class RefitWorkerExtension(CheckedWorkerExtension):
    """verl's worker extension with flashrl's `update_weights_from_ipc`; adapters (LoRA) still use verl's own update."""

    refits = 0
    _arrival: Arrival | None = None

    def update_weights_from_ipc(
        self, peft_config: dict[str, Any] | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> dict[str, float] | None:
        """Receive all buckets of a weight update, refit the engine and renew the handshake.

        Returns what of the update arrived (`Arrival.figures`).
        """
        if peft_config:
            return super().update_weights_from_ipc(
                peft_config=peft_config, base_sync_done=base_sync_done, use_shm=use_shm
            )
        # vLLM's CPU worker does not set the device
        self.device: torch.device = self.device or torch.device("cpu")
        device = self.device
        runner = self.model_runner
        dtypes: set[torch.dtype] = set()
        self._arrival = arrival = self._arrival or Arrival(runner.model)

        def stream(load: Load) -> None:
            dtypes.update(self._receive(load, device, use_shm))

        config = runner.vllm_config.model_config
        seconds = refit(runner.model, config, device, stream, reused=True, arrival=arrival)
        found = arrival.figures()
        self.refits += 1
        folder = contract.plugin_dir()
        if folder is not None:
            handshake = describe(runner.model, device=device, refits=self.refits, refit_s=seconds)
            received = "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            contract.write_handshake(folder, replace(handshake, received=received, arrival=found))
            log(handshake)
        return found

    def _receive(self, load: Load, device: torch.device, use_shm: bool) -> set[torch.dtype]:
        """Load every bucket of an update, and return the dtypes that arrived."""
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

        dtypes: set[torch.dtype] = set()

        def on_bucket(weights: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
            dtypes.update(tensor.dtype for _, tensor in weights)
            size = sum(tensor.nbytes for _, tensor in weights)
            contract.logger().debug("a bucket of %d tensors, %d bytes%s", len(weights), size, ", the last" * is_last)
            load(weights)
            # the last view of the shared memory must be gone before the receiver closes it
            weights.clear()

        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=device, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=on_bucket)
        return dtypes
